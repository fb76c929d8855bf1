#!/usr/bin/env bash
# Checks what commands that write files leave behind when they are killed. Safe to re-run.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/kill.sh [options] MODEL

Runs the commands of upg that write files on MODEL, a Hugging Face directory or a GGUF file, and ends
them with SIGKILL at random moments: compress, compress --resume, convert, decompress and, if the model
has a tokenizer, compress --calibrate, the same with --resume, and tune. Half of the runs find an older
output. After each kill:

- The folder of the output contains only the output and, with --resume, the two files of a stopped run.
  A file that replaces another has a hidden name, .upg-*.partial, for a moment; one such file, which the
  next run removes, is allowed.
- An output is the older one, byte for byte, or the complete new one.
- Nothing is left in the folder for temporary files.

In the end each command runs once more in the folder as the last kill left it, and must write the bytes
of an undisturbed run. Prints counts; ends with exit code 1 if anything was unexpected.

  --kills N      kills of all commands together, in turn [default: 100]
  --seed N       seed of the moments and of the older outputs [default: 1]
  --tokens N     tokens of text for --calibrate and tune [default: 1024]
  --only LIST    only these commands, separated by commas: compress, resume, calibrate,
                 calibrate-resume, tune, convert, decompress
  --old FILE     file of version 1 for convert [default: a small one of the tests]
  --upg PROGRAM  the command [default: target/release/upg]
  --folder DIR   work in DIR, on the file system to be tested [default: that for temporary files]
  --hidden       allow more hidden files, also without an older output; the next run must remove them.
                 For file systems without O_TMPFILE, and systems other than Linux

Needs bash (before version 5 also python3) and, in the working folder, room for a few copies of the
model.
END
}

wrong() {
    echo "$1" >&2
    usage >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kills=100 seed=1 tokens=1024 only="" old="$root/upg_kernel/tests/data/v1/model/tiny.upg"
upg="$root/target/release/upg" folder=${TMPDIR:-/tmp} allow_hidden=0 model=""
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --hidden) allow_hidden=1 ;;
    --kills | --seed | --tokens | --only | --old | --upg | --folder)
        [ $# -gt 1 ] || wrong "$1 needs a value"
        declare "${1#--}=$2"
        shift
        ;;
    -*) wrong "no such option: $1" ;;
    *) [ -z "$model" ] && model=$1 || wrong "more than one MODEL" ;;
    esac
    shift
done
[ -n "$model" ] || wrong "no MODEL given"
for number in "$kills" "$seed" "$tokens"; do
    [[ "$number" =~ ^[0-9]+$ ]] || wrong "not a whole number: $number"
done
if ! command -v "$upg" >/dev/null; then
    echo "Missing: $upg. Build it: cargo build --release" >&2
    exit 1
fi

work=$(mktemp -d "$folder/upg-kill-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work"/{input,expected,older,out,tmp}
export TMPDIR="$work/tmp"
log="$work/log"

# command_of CASE FOLDER: puts the command into the array `command`.
command_of() {
    local out="$2/model.safetensors"
    case "$1" in
    compress) command=(compress "$model" -o "$out" --encoding q4 --no-calibrate) ;;
    resume) command=(compress "$model" -o "$out" --encoding t3 --no-calibrate --resume) ;;
    calibrate) command=(compress "$model" -o "$out" --encoding t3 --calibrate --calibration-tokens "$tokens") ;;
    calibrate-resume) command_of calibrate "$2" && command+=(--resume) ;;
    tune)
        command=(tune "$work/input/t2" --original "$model" -o "$out" --tokens "$tokens" --passes 1)
        ;;
    convert)
        command=(convert "$old" -o "$out")
        if [ -e "$(dirname "$old")/config.json" ]; then command+=(--model "$(dirname "$old")"); fi
        ;;
    decompress) command=(decompress "$work/input/t2" -o "$2") ;;
    *) wrong "no such command: $1" ;;
    esac
}

run() {
    "$upg" "$@" >"$log" 2>&1 </dev/null || {
        echo "upg $* has failed:" >&2
        cat "$log" >&2
        exit 1
    }
}

# Since bash 5 without another program, whose start would take time.
microseconds() {
    if [ -n "${EPOCHREALTIME-}" ]; then
        echo "${EPOCHREALTIME/[.,]/}"
    else
        python3 -c 'import time; print(time.time_ns() // 1000)'
    fi
}

failures=0
fail() {
    echo "UNEXPECTED: $1" >&2
    failures=$((failures + 1))
}

same() {
    cmp -s "$1" "$2"
}

# older_output CASE FOLDER: puts an older output into FOLDER.
older_output() {
    case "$1" in
    decompress) run decompress "$work/input/q8" -o "$2" ;;
    *) echo "an older file" >"$2/model.safetensors" ;;
    esac
}

# check CASE FOLDER: checks FOLDER after a run was killed.
check() {
    local path name
    for path in "$2"/* "$2"/.[!.]*; do
        [ -e "$path" ] || [ -L "$path" ] || continue
        name=$(basename "$path")
        case "$1,$name" in
        *,.upg-????????????????.partial)
            hidden=$((hidden + 1))
            # Only a file that replaces another has a name for a moment.
            if [ "$allow_hidden" -eq 0 ] && { [ "$has_older" -eq 0 ] || [ "$hidden" -gt 1 ]; }; then
                fail "$1 has left $name"
            fi
            continue
            ;;
        resume,model.safetensors.partial* | calibrate-resume,model.safetensors.partial*)
            case "$name" in
            *.partial | *.partial.journal) continue ;;
            esac
            ;;
        esac
        same "$path" "$work/expected/$1/$name" || same "$path" "$work/older/$1/$name" ||
            fail "$1 has left $name, neither the older one nor the new one"
    done
    if [ "$has_older" -eq 1 ] && ! [ -e "$2/model.safetensors" ]; then fail "$1 has removed the older output"; fi
    if [ "$has_older" -eq 0 ] && [ "$1" != decompress ] && same "$2/model.safetensors" "$work/older/$1/model.safetensors"; then
        fail "$1 has an output from nowhere"
    fi
    for path in "$TMPDIR"/* "$TMPDIR"/.[!.]*; do
        [ -e "$path" ] || continue
        fail "$1 has left $(basename "$path") where temporary files are"
        rm -rf "$path"
    done
}

# check_finished CASE FOLDER: checks that FOLDER equals that of an undisturbed run.
check_finished() {
    diff -r "$work/expected/$1" "$2" >"$log" 2>&1 || {
        fail "$1 ended in other files than undisturbed:"
        cat "$log" >&2
    }
}

run compress "$model" -o "$work/input/t2" --encoding t2 --no-calibrate
run compress "$model" -o "$work/input/q8" --encoding q8
if [ -n "$only" ]; then
    IFS=, read -r -a cases <<<"$only"
elif "$upg" inspect "$work/input/t2" | grep -q 'tokenizer: yes'; then
    cases=(compress resume calibrate calibrate-resume tune convert decompress)
else
    cases=(compress resume convert decompress)
    echo "The model has no tokenizer: not run are calibrate, calibrate-resume and tune."
fi

times=() killed=() ended=() older=() hiddens=()
for i in "${!cases[@]}"; do
    case=${cases[i]}
    mkdir "$work"/{expected,older,out}/"$case"
    command_of "$case" "$work/expected/$case"
    run "${command[@]}"
    # The shorter of two runs: the first of all may have waited for the disk.
    times[i]=0
    for _ in 1 2; do
        rm -rf "$work/out/$case" && mkdir "$work/out/$case"
        command_of "$case" "$work/out/$case"
        started=$(microseconds)
        run "${command[@]}"
        took=$(($(microseconds) - started))
        if [ "${times[i]}" -eq 0 ] || [ $took -lt "${times[i]}" ]; then times[i]=$took; fi
        check_finished "$case" "$work/out/$case"
    done
    older_output "$case" "$work/older/$case"
    killed[i]=0 ended[i]=0 older[i]=0 hiddens[i]=0
done

RANDOM=$((seed % 32768))
for ((n = 0; n < kills; n++)); do
    i=$((n % ${#cases[@]})) case=${cases[n % ${#cases[@]}]}
    out="$work/out/$case" has_older=$((RANDOM % 2)) goes_on=$((RANDOM % 4)) hidden=0
    # Most runs with --resume continue what the one before has left.
    case "$case,$goes_on" in
    *resume,[123]) rm -f "$out/model.safetensors" ;;
    *) rm -rf "$out" && mkdir "$out" ;;
    esac
    if [ "$has_older" -eq 1 ]; then
        older_output "$case" "$out"
        older[i]=$((older[i] + 1))
    fi
    command_of "$case" "$out"
    moment=$((times[i] * (RANDOM * 32768 + RANDOM) / (32768 * 32768)))
    "$upg" "${command[@]}" >"$log" 2>&1 </dev/null &
    pid=$!
    sleep "$((moment / 1000000)).$(printf %06d $((moment % 1000000)))"
    kill -9 $pid 2>/dev/null || true
    status=0
    { wait $pid || status=$?; } 2>/dev/null
    case $status in
    137) killed[i]=$((killed[i] + 1)) ;;
    0)
        ended[i]=$((ended[i] + 1))
        check_finished "$case" "$out"
        ;;
    *)
        fail "$case has ended with exit code $status:"
        cat "$log" >&2
        ;;
    esac
    check "$case" "$out"
    hiddens[i]=$((hiddens[i] + hidden))
done

for case in "${cases[@]}"; do
    command_of "$case" "$work/out/$case"
    run "${command[@]}"
    check_finished "$case" "$work/out/$case"
done

printf '%-17s %9s %7s %13s %14s %13s\n' command seconds killed "ended before" "over an older" "hidden files"
for i in "${!cases[@]}"; do
    printf '%-17s %9s %7d %13d %14d %13d\n' "${cases[i]}" "$(printf '%d.%03d' $((times[i] / 1000000)) $((times[i] / 1000 % 1000)))" \
        "${killed[i]}" "${ended[i]}" "${older[i]}" "${hiddens[i]}"
done
if [ $failures -ne 0 ]; then
    echo "$failures times something was unexpected (seed $seed)."
    exit 1
fi
echo "After every kill all was as expected, and the last runs wrote the same bytes as undisturbed ones (seed $seed)."
