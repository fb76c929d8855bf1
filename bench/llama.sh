# Builds llama.cpp for bench/compare.sh and bench/quality.sh; sourced by them. They define fail MESSAGE.

llama_tools=(llama-bench llama-quantize llama-imatrix llama-perplexity)

# need_llama: ends with a message if a tool for the build is missing.
need_llama() {
    local tool
    for tool in c++ git; do
        command -v $tool >/dev/null || fail "Missing: $tool. Debian, Ubuntu: apt install g++ git"
    done
}

# llama_version: prints the version of the bindings that contain llama.cpp's source.
llama_version() {
    sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' bench/llama-cpp.txt
}

# build_llama FOLDER [FLAGS]: builds the tools for this processor into FOLDER/bin, unless they exist.
build_llama() {
    local llama=$1 flags=${2-} version tool missing=
    version=$(llama_version)
    for tool in "${llama_tools[@]}"; do
        [ -x "$llama/bin/$tool" ] || missing=yes
    done
    if [ -z "$missing" ]; then return; fi
    rm -rf "$llama"
    mkdir -p "$llama"
    make_venv "$llama/venv" bench/llama-build.txt
    # scikit-build-core only describes the source package; it builds nothing.
    "$llama/venv/bin/python" -m pip --disable-pip-version-check --no-input download --quiet --progress-bar off \
        --no-deps --no-build-isolation --require-hashes \
        --no-binary llama-cpp-python --dest "$llama" --requirement bench/llama-cpp.txt
    tar -xzf "$llama/llama_cpp_python-$version.tar.gz" -C "$llama" --no-same-owner
    # Its build asks git for a commit, which must not be that of this repository.
    export GIT_CEILING_DIRECTORIES=$llama
    PATH=$llama/venv/bin:$PATH cmake -G Ninja \
        -S "$llama/llama_cpp_python-$version/vendor/llama.cpp" -B "$llama/build" \
        -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
        -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
        >"$llama/cmake.log" 2>&1 || fail "llama.cpp cannot be built here: see $llama/cmake.log"
    "$llama/venv/bin/ninja" -C "$llama/build" "${llama_tools[@]}" >"$llama/ninja.log" 2>&1 ||
        fail "llama.cpp does not build: see $llama/ninja.log"
    mv "$llama/build/bin" "$llama/bin"
    rm -rf "$llama/build" "$llama/venv" "$llama/llama_cpp_python-$version"*
}
