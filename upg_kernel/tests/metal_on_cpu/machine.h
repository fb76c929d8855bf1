// Runs the threads of a GPU kernel on a CPU, one at a time, in a chosen order, and checks their
// memory accesses.
//
// A kernel is compiled by clang with the hooks of its thread sanitizer (`-fsanitize=thread`), which
// are defined here instead of by the sanitizer. They are called before every access to memory that
// other threads may see. So these errors are found for any order of the threads, and reported with
// the kernel, the thread and the place:
// - an access outside of the buffers and the threadgroup memory that the dispatch was given, or to
//     an element past the end of one (there are also inaccessible pages around it);
// - a write to a buffer that is bound for reading;
// - a read of uninitialized threadgroup memory, or of an uninitialized buffer that kernels write;
// - two threads at one byte, one of them writing, with no barrier for that memory between:
//     threadgroup_barrier, or simdgroup_barrier if both are in one SIMD-group; in device memory
//     also from different threadgroups, for which there is no barrier;
// - threads of a SIMD-group at different simd_* functions or different calls of one, or one of them
//     returned or at a barrier;
// - a barrier that not all threads of a threadgroup reach;
// - errors that `-fsanitize=alignment,shift,...` finds: they end in a trap, which is reported as
//     one.
//
// Not covered: Apple's compiler and hardware, speed, memory order weaker than that of barriers,
// sizes from 4 GiB on, and parts of Metal that the kernels do not use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace metal_on_cpu {

// ---- For <metal_stdlib>

constexpr unsigned SLOT = 16; // bytes that a lane can exchange
uint32_t lane();
const unsigned char *exchange(const char *name, int line, const void *value, size_t size);
// `memories`: 1 for threadgroup memory, 2 for device memory.
void simdgroup_barrier(unsigned memories, int line);
void threadgroup_barrier(unsigned memories, int line);
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ---- For the kernels, as translated

// Kind of a parameter of a kernel.
enum class Kind {
    Buffer,
    Threadgroup,
    PositionInGrid,
    PositionInThreadgroup,
    ThreadgroupInGrid,
    ThreadsPerThreadgroup,
    ThreadgroupsPerGrid,
    IndexInThreadgroup,
    IndexInSimdgroup,
    SimdgroupIndex,
    Simdgroups,
    ThreadsPerSimdgroup,
};
struct Parameter {
    Kind kind;
    unsigned index; // of Buffer and Threadgroup
};
struct Kernel {
    const char *name;
    void (*run)();
};
extern const Kernel kernels[]; // ends with a null name

void *pointer(const Parameter &parameter);
const uint32_t *numbers(const Parameter &parameter);

template <class A> inline A argument(const Parameter &parameter) {
    if constexpr (std::is_pointer_v<A>) {
        return A(pointer(parameter));
    } else if constexpr (std::is_reference_v<A>) {
        return *(std::remove_reference_t<A> *)pointer(parameter);
    } else {
        const uint32_t *from = numbers(parameter);
        if constexpr (std::is_arithmetic_v<A>) {
            return A(from[0]);
        } else {
            A vector;
            for (unsigned i = 0; i < sizeof(A) / sizeof(vector[0]); i++) {
                vector[i] = from[i];
            }
            return vector;
        }
    }
}
template <class... A, size_t... I>
inline void call_with(void (*kernel)(A...), const Parameter *parameters, std::index_sequence<I...>) {
    kernel(argument<A>(parameters[I])...);
}
template <class... A, size_t N> inline void call(void (*kernel)(A...), const Parameter (&parameters)[N]) {
    static_assert(sizeof...(A) == N, "a description for each parameter");
    call_with(kernel, parameters, std::index_sequence_for<A...>{});
}

// ---- For job.cpp

struct Buffer {
    unsigned char *bytes = nullptr;
    size_t size = 0;
    unsigned char *first = nullptr, *end = nullptr; // including the inaccessible pages
    bool is_written = false; // by kernels
    struct Cell;
    std::vector<Cell> cells; // of written buffers
    Buffer();
    ~Buffer();
    Buffer(Buffer &&);
};
// The last of `size` bytes is near an inaccessible page, and the first at an odd multiple of
// `alignment`.
Buffer make_buffer(size_t size, size_t alignment, bool is_written);
// Resets the memory to uninitialized.
void clear(Buffer &buffer);

struct Dispatch {
    std::string kernel;
    std::vector<uint32_t> buffers;           // by index of the parameter; UINT32_MAX: not bound
    uint32_t written;                        // the one that it may write
    std::vector<unsigned char> arguments;    // buffer 0
    uint32_t threadgroup_bytes;              // at index 0, the only one
    uint32_t threadgroups[2];
    uint32_t threads;
};
// Runs it in the order of `schedule`: 0 forwards, 1 backwards, others at random. Returns an error
// text.
std::string run(const Dispatch &dispatch, std::vector<Buffer> &buffers, uint64_t schedule);

} // namespace metal_on_cpu
