// Runs the dispatches on the standard input in several orders, and writes their results to the
// standard output.
//
// Numbers are u32, little-endian. Lists and texts start with their length.
//
// Input: the number of buffers; for each its size, alignment, whether kernels write it, and, if
// they do not, its bytes. The number of dispatches; for each its kernel, the numbers of its buffers
// and of the one it writes, its arguments, the size of its threadgroup memory, threadgroups in two
// dimensions, threads. The schedules.
//
// Output, for each schedule: an error, or an empty text and the bytes of the buffers that kernels
// write.
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <unistd.h>

using namespace metal_on_cpu;

static void read_bytes(void *to, size_t size) {
    if (size > 0 && fread(to, 1, size, stdin) != size) {
        fputs("the job ends early\n", stderr);
        exit(4);
    }
}
static uint32_t read_u32() {
    uint32_t value;
    read_bytes(&value, sizeof value);
    return value;
}
template <class T> static std::vector<T> read_list() {
    std::vector<T> list(read_u32());
    read_bytes(list.data(), list.size() * sizeof(T));
    return list;
}
static void write_u32(uint32_t value) { fwrite(&value, sizeof value, 1, stdout); }

// As on Apple's GPUs, subnormal numbers are 0.
static void flush_subnormals() {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" : : "r"(control | 1 << 24));
#endif
}

int main() {
    // A kernel that does not end is an error too.
    alarm(120);
    flush_subnormals();
    std::vector<Buffer> buffers;
    for (uint32_t n = read_u32(); n > 0; n--) {
        const uint32_t size = read_u32(), alignment = read_u32(), is_written = read_u32();
        buffers.push_back(make_buffer(size, alignment, is_written != 0));
        if (!is_written) {
            read_bytes(buffers.back().bytes, size);
        }
    }
    std::vector<Dispatch> dispatches(read_u32());
    for (Dispatch &dispatch : dispatches) {
        const std::vector<char> name = read_list<char>();
        dispatch.kernel.assign(name.begin(), name.end());
        dispatch.buffers = read_list<uint32_t>();
        dispatch.written = read_u32();
        dispatch.arguments = read_list<unsigned char>();
        dispatch.threadgroup_bytes = read_u32();
        dispatch.threadgroups[0] = read_u32();
        dispatch.threadgroups[1] = read_u32();
        dispatch.threads = read_u32();
    }
    for (uint32_t schedule : read_list<uint32_t>()) {
        std::string error;
        for (Buffer &buffer : buffers) {
            if (buffer.is_written) {
                clear(buffer);
            }
        }
        for (const Dispatch &dispatch : dispatches) {
            error = error.empty() ? run(dispatch, buffers, schedule) : error;
        }
        write_u32(uint32_t(error.size()));
        fwrite(error.data(), 1, error.size(), stdout);
        if (!error.empty()) {
            continue;
        }
        for (const Buffer &buffer : buffers) {
            if (buffer.is_written) {
                fwrite(buffer.bytes, 1, buffer.size, stdout);
            }
        }
    }
    return fflush(stdout) == 0 ? 0 : 4;
}
