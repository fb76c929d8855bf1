// See machine.h.
#include "machine.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

// Saves the callee-saved registers and the stack pointer to *from, and continues on the stack `to`.
extern "C" void switch_stack(void **from, void *to);
#ifdef __APPLE__
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif
#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL("switch_stack") "\n" SYMBOL("switch_stack") ":\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
constexpr size_t SAVED = 6, RETURN = 6;
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n.globl " SYMBOL("switch_stack") "\n" SYMBOL("switch_stack") ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
    "mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
    "ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\n ret\n");
constexpr size_t SAVED = 20, RETURN = 11;
#else
#error "switching stacks is written for x86-64 and 64-bit ARM"
#endif

namespace metal_on_cpu {

constexpr uint32_t WIDTH = 32;
constexpr size_t STACK = 64 << 10;
constexpr unsigned char POISON = 0xFF; // as floats: NaN

// A thread, by its number among those of all threadgroups (0: none), and the number of barriers for
// this memory that it had passed.
struct Touch {
    uint64_t thread = 0;
    uint32_t epoch = 0;
};
// Last accesses to a byte. Three readers since the last barrier are enough: two of them are not the
// thread that writes next.
struct Buffer::Cell {
    Touch writer, readers[3];
    bool is_set = false;
    bool is_read_elsewhere = false; // by another threadgroup
};
typedef Buffer::Cell Cell;

Buffer::Buffer() = default;
Buffer::~Buffer() = default;
Buffer::Buffer(Buffer &&) = default;

enum class State { Ready, AtFunction, AtBarrier, Returned };

struct Thread {
    void *stack_pointer;
    State state;
    const char *function; // at which it waits
    int line;
    unsigned memories; // memories of its barrier, a bit each
    uint32_t index, lane, simd;
    uint32_t position[3], in_group[3];
    uint32_t epochs[2]; // barriers that it has passed, for threadgroup and device memory
    uint32_t calls;     // of SIMD-group functions
};

struct Simdgroup {
    unsigned char slots[2][WIDTH * SLOT]; // alternating: one is read while the next is filled
    uint32_t turn;
};

struct Threadgroup {
    std::vector<Thread> threads;
    std::vector<Simdgroup> simds;
    uint32_t epochs[2]; // barriers of all threads so far, for either memory
    uint32_t position[3], size[3], grid[3];
    uint32_t simd_count;
    uint64_t first_thread; // number among those of all threadgroups
};

struct Memory {
    std::vector<unsigned char> bytes;
    std::vector<Cell> cells;
    size_t size;
};

struct Machine {
    Threadgroup group;
    Memory shared;
    const Dispatch *dispatch;
    std::vector<Buffer> *buffers;
    std::vector<unsigned char> arguments;
    const Kernel *kernel;
    unsigned char *stacks = nullptr;
    size_t stack_count = 0;
    void *main_stack;
    Thread *running = nullptr;
    std::string error;
};
static Machine machine;

// ---- Errors

static std::string where() {
    const Thread &thread = *machine.running;
    char text[200];
    snprintf(text, sizeof text, "%s: thread %u of threadgroup %u,%u", machine.kernel->name, thread.index,
             machine.group.position[0], machine.group.position[1]);
    return text;
}

static void back_to_main() { switch_stack(&machine.running->stack_pointer, machine.main_stack); }

void fail(const char *format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (machine.error.empty()) {
        machine.error = where() + ": " + text;
    }
    machine.running->state = State::Returned;
    back_to_main();
    abort();
}

static void on_signal(int signal, siginfo_t *info, void *) {
    // Only functions that may be called here; the process ends.
    char text[400];
    const char *kernel = machine.running ? machine.kernel->name : "no kernel";
    const unsigned thread = machine.running ? machine.running->index : 0;
    const int length =
        signal == SIGSEGV || signal == SIGBUS
            ? snprintf(text, sizeof text, "%s: thread %u: memory at %p cannot be touched\n", kernel, thread, info->si_addr)
            : snprintf(text, sizeof text, "%s: thread %u: undefined: alignment, shift, bounds or overflow\n", kernel, thread);
    if (write(STDERR_FILENO, text, size_t(length)) < 0) {
        _exit(4);
    }
    _exit(3);
}

static void catch_signals() {
    static unsigned char stack[64 << 10];
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE}) {
        sigaction(signal, &action, nullptr);
    }
}

// ---- Memory

static size_t pages(size_t size) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    return (size + page - 1) / page * page;
}

Buffer make_buffer(size_t size, size_t alignment, bool is_written) {
    const size_t page = pages(1), body = pages(size + alignment);
    // An inaccessible page before and one after.
    unsigned char *all = (unsigned char *)mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANON, -1, 0);
    if (all == MAP_FAILED || mprotect(all, page, PROT_NONE) || mprotect(all + page + body, page, PROT_NONE)) {
        perror("memory of a buffer");
        exit(4);
    }
    Buffer buffer;
    buffer.first = all;
    buffer.end = all + body + 2 * page;
    buffer.bytes = all + page + (body - size) / alignment * alignment;
    // No more aligned than necessary.
    if ((uintptr_t)buffer.bytes / alignment % 2 == 0 && buffer.bytes > all + page) {
        buffer.bytes -= alignment;
    }
    buffer.size = size;
    buffer.is_written = is_written;
    if (is_written) {
        buffer.cells.resize(size);
    }
    return buffer;
}

void clear(Buffer &buffer) {
    memset(buffer.bytes, POISON, buffer.size);
    buffer.cells.assign(buffer.cells.size(), Cell());
}

static bool is_stack(const unsigned char *at) {
    return at >= machine.stacks && at < machine.stacks + machine.stack_count * STACK;
}

#ifndef __APPLE__
extern "C" char __executable_start, end;
#endif
// Constants of the program, and the variables of this file.
static bool is_program(const unsigned char *at) {
#ifdef __APPLE__
    // Not distinguished from other memory there; errors near a buffer are still found.
    (void)at;
    return true;
#else
    return at >= (unsigned char *)&__executable_start && at < (unsigned char *)&end;
#endif
}
template <class T> static bool is_in(const std::vector<T> &list, const unsigned char *at) {
    return at >= (const unsigned char *)list.data() && at < (const unsigned char *)(list.data() + list.size());
}
// Memory of this file that <metal_stdlib> and `argument` read.
static bool is_machine(const unsigned char *at) {
    return is_in(machine.group.simds, at) || is_in(machine.group.threads, at);
}

static bool is_of_this_group(uint64_t thread) {
    const Threadgroup &group = machine.group;
    return thread >= group.first_thread && thread < group.first_thread + group.threads.size();
}

// Whether the running thread and that of `other` access a byte without a barrier for this memory
// between.
static bool is_race(const Touch &other, unsigned memory) {
    const Thread &thread = *machine.running;
    const Threadgroup &group = machine.group;
    if (other.thread == 0 || other.thread == group.first_thread + thread.index) {
        return false;
    }
    if (!is_of_this_group(other.thread)) {
        return true; // they run at any time
    }
    // Within a SIMD-group its own barriers count too.
    const Thread &second = group.threads[other.thread - group.first_thread];
    return second.simd == thread.simd ? other.epoch == thread.epochs[memory] : other.epoch >= group.epochs[memory];
}

// Records a reader, in place of an obsolete one.
static void note_reader(Cell &cell, Touch self, unsigned memory) {
    Touch *place = nullptr;
    for (Touch &reader : cell.readers) {
        if (reader.thread != 0 && !is_of_this_group(reader.thread)) {
            cell.is_read_elsewhere = true;
            reader = Touch();
        }
        if (reader.thread == self.thread) {
            reader = self;
            return;
        }
        if (reader.thread == 0 || reader.epoch < machine.group.epochs[memory]) {
            place = &reader;
        }
    }
    if (place) {
        *place = self;
    }
}

enum { OF_THREADGROUP, OF_DEVICE };

static void touch(std::vector<Cell> &cells, size_t offset, size_t size, bool is_write, unsigned memory) {
    static const char *const names[] = {"threadgroup memory", "a buffer"};
    const Thread &thread = *machine.running;
    const Touch self = {machine.group.first_thread + thread.index, thread.epochs[memory]};
    for (size_t i = offset; i < offset + size; i++) {
        Cell &cell = cells[i];
        if (!is_write && !cell.is_set) {
            fail("reads byte %zu of %s, which nothing has written", i, names[memory]);
        }
        if (is_race(cell.writer, memory)) {
            fail("%s byte %zu of %s, which another thread writes, without a barrier between",
                 is_write ? "writes" : "reads", i, names[memory]);
        }
        if (!is_write) {
            note_reader(cell, self, memory);
            continue;
        }
        bool is_read = cell.is_read_elsewhere;
        for (const Touch &reader : cell.readers) {
            is_read = is_read || is_race(reader, memory);
        }
        if (is_read) {
            fail("writes byte %zu of %s, which another thread reads, without a barrier between", i, names[memory]);
        }
        cell.writer = self;
        cell.is_set = true;
    }
}

static void access(const void *address, size_t size, bool is_write) {
    if (!machine.running) {
        return;
    }
    const unsigned char *at = (const unsigned char *)address;
    if (is_stack(at)) {
        return;
    }
    for (Buffer &buffer : *machine.buffers) {
        if (at < buffer.first || at >= buffer.end) {
            continue;
        }
        const ptrdiff_t offset = at - buffer.bytes;
        if (offset < 0 || size_t(offset) + size > buffer.size) {
            fail("%zu bytes at %td are outside of a buffer of %zu", size, offset, buffer.size);
        }
        const bool is_bound_for_writing = &buffer == &(*machine.buffers)[machine.dispatch->written];
        if (is_write && !is_bound_for_writing) {
            fail("writes to a buffer that is bound for reading");
        }
        if (buffer.is_written) {
            touch(buffer.cells, size_t(offset), size, is_write, OF_DEVICE);
        }
        return;
    }
    Memory &shared = machine.shared;
    if (at >= shared.bytes.data() && at < shared.bytes.data() + shared.size) {
        const size_t offset = size_t(at - shared.bytes.data());
        if (offset + size > shared.size) {
            fail("%zu bytes at %zu are past %zu of threadgroup memory", size, offset, shared.size);
        }
        touch(shared.cells, offset, size, is_write, OF_THREADGROUP);
        return;
    }
    if (is_in(machine.arguments, at) && is_in(machine.arguments, at + size - 1) && !is_write) {
        return;
    }
    if (is_write || !(is_machine(at) || is_program(at))) {
        fail("%s memory that is none of its own, at %p", is_write ? "writes" : "reads", address);
    }
}

// ---- Functions that a thread calls

uint32_t lane() { return machine.running->lane; }

const unsigned char *exchange(const char *name, int line, const void *value, size_t size) {
    Thread &thread = *machine.running;
    Simdgroup &simd = machine.group.simds[thread.simd];
    unsigned char *slots = simd.slots[simd.turn];
    memcpy(slots + SLOT * thread.lane, value, size);
    thread.state = State::AtFunction;
    thread.calls++;
    thread.function = name;
    thread.line = line;
    back_to_main();
    return slots;
}

void simdgroup_barrier(unsigned memories, int line) {
    const char nothing = 0;
    exchange("simdgroup_barrier", line, &nothing, 1);
    for (unsigned memory : {OF_THREADGROUP, OF_DEVICE}) {
        machine.running->epochs[memory] += memories >> memory & 1;
    }
}

void threadgroup_barrier(unsigned memories, int line) {
    Thread &thread = *machine.running;
    thread.state = State::AtBarrier;
    thread.function = "threadgroup_barrier";
    thread.line = line;
    thread.memories = memories;
    back_to_main();
}

void *pointer(const Parameter &parameter) {
    if (parameter.kind == Kind::Threadgroup) {
        if (parameter.index > 0 || machine.shared.size == 0) {
            fail("threadgroup memory %u is not bound", parameter.index);
        }
        return machine.shared.bytes.data();
    }
    if (parameter.index == 0) {
        return machine.arguments.data();
    }
    const std::vector<uint32_t> &bound = machine.dispatch->buffers;
    if (parameter.index >= bound.size() || bound[parameter.index] == UINT32_MAX) {
        return nullptr;
    }
    return (*machine.buffers)[bound[parameter.index]].bytes;
}

const uint32_t *numbers(const Parameter &parameter) {
    static const uint32_t width = WIDTH;
    const Thread &thread = *machine.running;
    const Threadgroup &group = machine.group;
    switch (parameter.kind) {
    case Kind::PositionInGrid: return thread.position;
    case Kind::PositionInThreadgroup: return thread.in_group;
    case Kind::ThreadgroupInGrid: return group.position;
    case Kind::ThreadsPerThreadgroup: return group.size;
    case Kind::ThreadgroupsPerGrid: return group.grid;
    case Kind::IndexInThreadgroup: return &thread.index;
    case Kind::IndexInSimdgroup: return &thread.lane;
    case Kind::SimdgroupIndex: return &thread.simd;
    case Kind::Simdgroups: return &group.simd_count;
    case Kind::ThreadsPerSimdgroup: return &width;
    default: fail("a number that is none");
    }
}

// ---- Schedules

static void thread_main() {
    machine.kernel->run();
    machine.running->state = State::Returned;
    back_to_main();
    abort();
}

static void resume(Thread &thread) {
    machine.running = &thread;
    switch_stack(&machine.main_stack, thread.stack_pointer);
    machine.running = nullptr;
}

static uint32_t next(uint64_t &random) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return uint32_t(random);
}

// The numbers 0 to n - 1 (at most 32), in the order of a schedule.
struct Order {
    unsigned char all[WIDTH];
    uint32_t n;
    Order(uint32_t n, uint64_t schedule, uint64_t &random) : n(n) {
        for (uint32_t i = 0; i < n; i++) {
            all[i] = (unsigned char)(schedule == 1 ? n - 1 - i : i);
        }
        for (uint32_t i = n; schedule > 1 && i > 1; i--) {
            std::swap(all[i - 1], all[next(random) % i]);
        }
    }
    const unsigned char *begin() const { return all; }
    const unsigned char *end() const { return all + n; }
};

// Runs a SIMD-group until all of it waits at a barrier or has returned.
static void run_simdgroup(uint32_t simd, uint64_t schedule, uint64_t &random) {
    Thread *lanes = &machine.group.threads[simd * WIDTH];
    for (;;) {
        for (uint32_t lane : Order(WIDTH, schedule, random)) {
            if (lanes[lane].state == State::Ready) {
                resume(lanes[lane]);
                if (!machine.error.empty()) {
                    return;
                }
            }
        }
        const Thread *first = nullptr;
        for (uint32_t lane = 0; lane < WIDTH; lane++) {
            first = !first && lanes[lane].state == State::AtFunction ? &lanes[lane] : first;
        }
        if (!first) {
            return;
        }
        for (uint32_t lane = 0; lane < WIDTH; lane++) {
            Thread &thread = lanes[lane];
            if (thread.state != State::AtFunction || thread.line != first->line || thread.function != first->function ||
                thread.calls != first->calls) {
                machine.running = &thread;
                machine.error = where() + ": is not at " + first->function + " in line " + std::to_string(first->line) +
                                ", where others of its SIMD-group are";
                return;
            }
            thread.state = State::Ready;
        }
        machine.group.simds[simd].turn ^= 1;
    }
}

static void run_threadgroup(uint64_t schedule, uint64_t &random) {
    Threadgroup &group = machine.group;
    for (;;) {
        for (uint32_t simd : Order(group.simd_count, schedule, random)) {
            run_simdgroup(simd, schedule, random);
            if (!machine.error.empty()) {
                return;
            }
        }
        size_t returned = 0;
        for (Thread &thread : group.threads) {
            returned += thread.state == State::Returned;
        }
        if (returned == group.threads.size()) {
            return;
        }
        const Thread *waiting = nullptr;
        for (Thread &thread : group.threads) {
            waiting = !waiting && thread.state == State::AtBarrier ? &thread : waiting;
        }
        for (Thread &thread : group.threads) {
            if (thread.state != State::AtBarrier || thread.line != waiting->line) {
                machine.running = &thread;
                machine.error = where() + ": does not reach the barrier in line " + std::to_string(waiting->line);
                return;
            }
            thread.state = State::Ready;
        }
        for (unsigned memory : {OF_THREADGROUP, OF_DEVICE}) {
            if (!(waiting->memories >> memory & 1)) {
                continue;
            }
            // A barrier of all threads is one of each SIMD-group too: the counts continue from the
            // largest.
            uint32_t epoch = group.epochs[memory];
            for (Thread &thread : group.threads) {
                epoch = thread.epochs[memory] > epoch ? thread.epochs[memory] : epoch;
            }
            group.epochs[memory] = epoch + 1;
            for (Thread &thread : group.threads) {
                thread.epochs[memory] = epoch + 1;
            }
        }
    }
}

static void begin_threadgroup(const Dispatch &dispatch, uint32_t number) {
    Threadgroup &group = machine.group;
    group.position[0] = number % dispatch.threadgroups[0];
    group.position[1] = number / dispatch.threadgroups[0];
    group.first_thread = 1 + uint64_t(number) * dispatch.threads;
    group.simd_count = dispatch.threads / WIDTH;
    group.simds.assign(group.simd_count, Simdgroup());
    group.threads.resize(dispatch.threads);
    group.epochs[OF_THREADGROUP]++;
    group.epochs[OF_DEVICE]++;
    for (uint32_t i = 0; i < dispatch.threads; i++) {
        Thread &thread = group.threads[i];
        thread.state = State::Ready;
        thread.index = i;
        thread.lane = i % WIDTH;
        thread.simd = i / WIDTH;
        memcpy(thread.epochs, group.epochs, sizeof thread.epochs);
        thread.calls = 0;
        thread.in_group[0] = i;
        thread.in_group[1] = thread.in_group[2] = 0;
        thread.position[0] = group.position[0] * dispatch.threads + i;
        thread.position[1] = group.position[1];
        thread.position[2] = 0;
        // As if `switch_stack` had been called at the start of `thread_main`.
        void **top = (void **)(machine.stacks + (i + 1) * STACK) - 4;
        top -= SAVED + 1;
        top = (void **)((uintptr_t)top & ~uintptr_t(15));
        memset(top, 0, (SAVED + 1) * sizeof(void *));
        top[RETURN] = (void *)thread_main;
        thread.stack_pointer = top;
    }
    memset(machine.shared.bytes.data(), POISON, machine.shared.bytes.size());
    machine.shared.cells.assign(machine.shared.size, Cell());
}

std::string run(const Dispatch &dispatch, std::vector<Buffer> &buffers, uint64_t schedule) {
    static bool is_first = true;
    if (is_first) {
        catch_signals();
        is_first = false;
    }
    machine.kernel = kernels;
    while (machine.kernel->name && dispatch.kernel != machine.kernel->name) {
        machine.kernel++;
    }
    if (!machine.kernel->name) {
        return "there is no kernel " + dispatch.kernel;
    }
    if (dispatch.threads == 0 || dispatch.threads % WIDTH != 0 || dispatch.threads > 1024) {
        return dispatch.kernel + ": " + std::to_string(dispatch.threads) + " threads are not up to 32 SIMD-groups";
    }
    if (dispatch.threadgroup_bytes % 16 != 0 || dispatch.threadgroup_bytes > 32768) {
        return dispatch.kernel + ": " + std::to_string(dispatch.threadgroup_bytes) +
               " bytes of threadgroup memory are not a multiple of 16 up to 32 KiB";
    }
    machine.dispatch = &dispatch;
    machine.buffers = &buffers;
    machine.arguments = dispatch.arguments;
    machine.error.clear();
    machine.shared.size = dispatch.threadgroup_bytes;
    machine.shared.bytes.resize(machine.shared.size + 64);
    if (machine.stack_count < dispatch.threads) {
        machine.stack_count = 1024;
        machine.stacks = (unsigned char *)mmap(nullptr, machine.stack_count * STACK, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    }
    Threadgroup &group = machine.group;
    group.epochs[OF_THREADGROUP] = group.epochs[OF_DEVICE] = 0;
    group.size[0] = dispatch.threads;
    group.grid[0] = dispatch.threadgroups[0];
    group.grid[1] = dispatch.threadgroups[1];
    group.size[1] = group.size[2] = group.grid[2] = 1;
    group.position[2] = 0;
    // Earlier accesses belong to another dispatch, which has finished.
    for (Buffer &buffer : buffers) {
        for (Cell &cell : buffer.cells) {
            const bool is_set = cell.is_set;
            cell = Cell();
            cell.is_set = is_set;
        }
    }
    uint64_t random = (schedule + 1) * 0x9E3779B97F4A7C15;
    std::vector<uint32_t> numbers(dispatch.threadgroups[0] * dispatch.threadgroups[1]);
    for (uint32_t i = 0; i < numbers.size(); i++) {
        numbers[i] = schedule == 1 ? uint32_t(numbers.size()) - 1 - i : i;
    }
    for (uint32_t i = uint32_t(numbers.size()); schedule > 1 && i > 1; i--) {
        std::swap(numbers[i - 1], numbers[next(random) % i]);
    }
    for (uint32_t number : numbers) {
        begin_threadgroup(dispatch, number);
        run_threadgroup(schedule, random);
        machine.running = nullptr;
        if (!machine.error.empty()) {
            return machine.error;
        }
    }
    return "";
}

} // namespace metal_on_cpu

// ---- Hooks of `-fsanitize=thread`

using metal_on_cpu::access;
#define HOOKS(size)                                                                   \
    extern "C" void __tsan_read##size(void *at) { access(at, size, false); }          \
    extern "C" void __tsan_write##size(void *at) { access(at, size, true); }          \
    extern "C" void __tsan_unaligned_read##size(void *at) { access(at, size, false); } \
    extern "C" void __tsan_unaligned_write##size(void *at) { access(at, size, true); } \
    extern "C" void __tsan_read_write##size(void *at) {                                \
        access(at, size, false);                                                       \
        access(at, size, true);                                                        \
    }                                                                                  \
    extern "C" void __tsan_unaligned_read_write##size(void *at) { __tsan_read_write##size(at); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void *__tsan_memcpy(void *to, const void *from, size_t size) {
    access(from, size, false);
    access(to, size, true);
    return memcpy(to, from, size);
}
extern "C" void *__tsan_memset(void *to, int value, size_t size) {
    access(to, size, true);
    return memset(to, value, size);
}
