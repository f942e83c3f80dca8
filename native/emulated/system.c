// Runs one static Linux program on a bare machine, in ring 0, and answers its system calls. Threads take turns where
// they wait. What is printed goes to port 0xe9.
//
// Memory: this system from 1 MB on, pages' tables from 2 MB on, the program and its heap from 4 MB on, mmap from 128 MB
// to 448 MB, in pages of 4 KB whose protection works; the same again, never protected, from 512 MB on. The last 4 MB
// below 4 GB are a ROM: first the arguments, each ended by 0, the last by two; after 4 KB the program's file.
typedef unsigned long u64;
typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;

enum { PAGE = 4096, MAPS = 128 << 20, MAPS_END = 448 << 20, PAGES = (MAPS_END - MAPS) / PAGE, THREADS = 16 };
enum { STACK = 8 << 20, ALIAS = 512 << 20 };
enum { ENOENT = -2, EAGAIN = -11, ENOMEM = -12, ENODEV = -19, EINVAL = -22, ENOTTY = -25, ENOSYS = -38, ETIMEDOUT = -110 };

static const char *const arguments = (char *)0xffc00000, *const file = (char *)0xffc01000;

static void out(u32 port, u8 byte) { asm volatile("outb %0, %w1" ::"a"(byte), "Nd"(port)); }

static void print(const char *text, u64 length) {
    for (u64 i = 0; i < length; i++) out(0xe9, text[i]);
}

static void say(const char *what, u64 number) {
    for (; *what; what++) out(0xe9, *what);
    for (int shift = 60; shift >= 0; shift -= 4) out(0xe9, "0123456789abcdef"[number >> shift & 15]);
    out(0xe9, '\n');
}

static void stop(const char *what, u64 number) {
    say(what, number);
    for (const char *text = "Shutdown"; *text; text++) out(0x8900, *text); // Bochs ends
    for (;;) asm volatile("cli; hlt");
}

static void write_msr(u32 msr, u64 x) { asm volatile("wrmsr" ::"c"(msr), "a"((u32)x), "d"((u32)(x >> 32))); }

static u64 read_time(void) {
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return low | (u64)high << 32;
}

// the compiler calls these two
void *memcpy(void *to, const void *from, u64 bytes) {
    void *result = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
    return result;
}

void *memset(void *to, int value, u64 bytes) {
    void *result = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
    return result;
}

// ---- faults

struct fault {
    u64 number, code, rip, cs, flags, rsp;
};

void fault(struct fault *f, u64 address) {
    say("rip ", f->rip);
    say("address ", address);
    say("rsp ", f->rsp);
    stop("FAULT ", f->number);
}

// ---- threads

struct frame { // as boot.S pushes it
    u64 rax, r9, r8, r10, rdx, rsi, rdi, r15, r14, r13, r12, rbp, rbx, flags, rip, rsp;
};

static struct thread {
    enum { FREE, READY, WAITING } state;
    u64 rsp, fs;
    u32 *waits_for, *clear_at_exit;
    int has_timeout, timed_out;
    u8 stack[16384] __attribute__((aligned(16)));
    u8 vectors[12288] __attribute__((aligned(64)));
} threads[THREADS], *now = threads;

u64 user_rsp, kernel_rsp; // of boot.S
void syscall_entry(void), thread_start(void), switch_to(u64 *, u64), enter(u64, u64), faults(void);

static void save_vectors(struct thread *t) {
    asm volatile("xsave64 %0" : "=m"(t->vectors) : "a"(-1), "d"(-1) : "memory");
}

static void set_fs(u64 fs) {
    now->fs = fs;
    write_msr(0xc0000100, fs);
}

static void schedule(void) {
    struct thread *old = now;
    for (u64 i = 1; i <= THREADS; i++) {
        struct thread *t = &threads[(old - threads + i) % THREADS];
        if (t->state != READY) continue;
        if (t == old) return;
        save_vectors(old);
        now = t;
        kernel_rsp = (u64)(t->stack + sizeof t->stack);
        set_fs(t->fs);
        asm volatile("xrstor64 %0" ::"m"(t->vectors), "a"(-1), "d"(-1) : "memory");
        switch_to(&old->rsp, t->rsp);
        return;
    }
    for (struct thread *t = threads; t < threads + THREADS; t++) // time passes for who waits for it
        if (t->state == WAITING && t->has_timeout) {
            t->timed_out = 1;
            t->state = READY;
            schedule();
            return;
        }
    stop("all threads wait ", 0);
}

static u64 futex_wake(u32 *futex, u64 count) {
    u64 woken = 0;
    for (struct thread *t = threads; t < threads + THREADS && woken < count; t++)
        if (t->state == WAITING && t->waits_for == futex) {
            t->state = READY;
            woken++;
        }
    return woken;
}

static u64 futex(u32 *futex, u64 operation, u64 value, u64 timeout) {
    switch (operation & 127) {
    case 0: case 9: // wait
        if (*futex != (u32)value) return EAGAIN;
        now->waits_for = futex;
        now->has_timeout = timeout != 0;
        now->timed_out = 0;
        now->state = WAITING;
        schedule();
        return now->timed_out ? ETIMEDOUT : 0;
    case 1: case 10: return futex_wake(futex, value);
    }
    return ENOSYS;
}

static u64 clone(const struct frame *f) {
    const u64 flags = f->rdi, set_parent_tid = 0x100000, clear_child_tid = 0x200000;
    for (struct thread *t = threads; t < threads + THREADS; t++) {
        if (t->state != FREE) continue;
        struct frame *child = (struct frame *)(t->stack + sizeof t->stack) - 1;
        *child = *f;
        child->rax = 0;
        child->rsp = f->rsi;
        u64 *saved = (u64 *)child - 7; // six registers, then where switch_to returns to
        memset(saved, 0, 48);
        saved[6] = (u64)thread_start;
        t->rsp = (u64)saved;
        t->fs = f->r8;
        save_vectors(t);
        t->clear_at_exit = flags & clear_child_tid ? (u32 *)f->r10 : 0;
        t->state = READY;
        const u32 tid = t - threads + 1;
        if (flags & set_parent_tid) *(u32 *)f->rdx = tid;
        return tid;
    }
    return EAGAIN;
}

static u64 exit(u64 status) {
    if (now == threads) stop("EXIT ", status);
    if (now->clear_at_exit) {
        *now->clear_at_exit = 0;
        futex_wake(now->clear_at_exit, 1);
    }
    now->state = FREE;
    schedule();
    return 0;
}

// ---- memory

static u64 *const tables = (u64 *)0x210000; // an entry for each page
static u64 lowest;                          // no page below it is free
static u8 used[PAGES], dirty[PAGES];        // dirty: written to since it was all zero
static u64 heap;

static void protect(u64 address, u64 bytes, u64 protection) {
    const u64 end = (address + bytes - MAPS + PAGE - 1) / PAGE;
    for (u64 page = (address - MAPS) / PAGE; page < end; page++) {
        dirty[page] |= tables[page] >> 6 & 1;
        tables[page] = (MAPS + page * PAGE) | (protection ? 1 : 0) | (protection & 2);
    }
    asm volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
}

static u64 map(u64 bytes, u64 protection) {
    const u64 pages = (bytes + PAGE - 1) / PAGE;
    u64 run = 0;
    while (lowest < PAGES && used[lowest]) lowest++;
    for (u64 page = lowest; page < PAGES; page++) {
        run = used[page] ? 0 : run + 1;
        if (run < pages) continue;
        const u64 first = page + 1 - pages, address = MAPS + first * PAGE;
        memset(used + first, 1, pages);
        for (u64 i = first; i <= page; i++) {
            if (dirty[i]) memset((void *)(ALIAS + i * PAGE), 0, PAGE);
            dirty[i] = 0;
        }
        protect(address, bytes, protection);
        return address;
    }
    return ENOMEM;
}

static u64 unmap(u64 address, u64 bytes) {
    const u64 first = (address - MAPS) / PAGE;
    protect(address, bytes, 0);
    memset(used + first, 0, (bytes + PAGE - 1) / PAGE);
    if (first < lowest) lowest = first;
    return 0;
}

static u64 mmap(const struct frame *f) {
    const u64 fixed = 0x10, anonymous = 0x20;
    if (!(f->r10 & anonymous)) return ENODEV;
    if (!(f->r10 & fixed)) return map(f->rsi, f->rdx);
    memset((void *)(f->rdi - MAPS + ALIAS), 0, f->rsi);
    protect(f->rdi, f->rsi, f->rdx);
    return f->rdi;
}

static u64 brk(u64 end) {
    if (end > heap && end < MAPS) {
        memset((void *)heap, 0, end - heap);
        heap = end;
    }
    return heap;
}

// ---- system calls

static u64 arch_prctl(u64 what, u64 address) {
    switch (what) {
    case 0x1002: set_fs(address); return 0;
    case 0x1003: *(u64 *)address = now->fs; return 0;
    case 0x1023: return 0; // AMX: may be used, XCR0 has all that there is
    }
    return EINVAL;
}

u64 syscall(struct frame *f) {
    const u64 a = f->rdi, b = f->rsi, c = f->rdx;
    switch (f->rax) {
    case 1: print((char *)b, c); return c; // write
    case 20: { // writev
        u64 total = 0;
        for (const u64 *part = (u64 *)b; part < (u64 *)b + 2 * c; part += 2) {
            print((char *)part[0], part[1]);
            total += part[1];
        }
        return total;
    }
    case 9: return mmap(f);
    case 10: // mprotect; what is not in pages of 4 KB stays as it is
        if (a >= MAPS && a < MAPS_END) protect(a, b, c);
        return 0;
    case 11: return unmap(a, b);
    case 12: return brk(a);
    case 24: schedule(); return 0; // sched_yield
    case 56: return clone(f);
    case 60: return exit(a);
    case 231: stop("EXIT ", a); return 0; // exit_group
    case 202: return futex((u32 *)a, b, c, f->r10);
    case 158: return arch_prctl(a, b);
    case 218: now->clear_at_exit = (u32 *)a; return now - threads + 1; // set_tid_address
    case 39: return 1; // getpid
    case 186: return now - threads + 1; // gettid
    case 228: // clock_gettime
        ((u64 *)b)[0] = read_time() / 1000000000;
        ((u64 *)b)[1] = read_time() % 1000000000;
        return 0;
    case 318: // getrandom
        for (u64 i = 0; i < b; i++) ((u8 *)a)[i] = read_time() * 0x9e3779b97f4a7c15 >> 56;
        return b;
    case 302: // prlimit64
        if (f->r10) {
            ((u64 *)f->r10)[0] = STACK;
            ((u64 *)f->r10)[1] = -1;
        }
        return 0;
    case 204: *(u64 *)c = 1; return 8; // sched_getaffinity: one processor
    case 7: case 13: case 14: case 28: case 35: case 131: case 157: case 273:
        return 0; // poll, rt_sigaction, rt_sigprocmask, madvise, nanosleep, sigaltstack, prctl, set_robust_list
    case 2: case 79: case 89: case 257: case 267: return ENOENT; // open, getcwd, readlink, openat, readlinkat
    case 16: return ENOTTY; // ioctl
    case 0: case 3: case 5: case 25: case 72: case 262: case 332: case 334: case 435:
        return ENOSYS; // read, close, fstat, mremap, fcntl, newfstatat, statx, rseq, clone3
    case 62: case 200: case 234: stop("SIGNAL ", f->rax == 234 ? c : b); // kill, tkill, tgkill
    }
    say("no such system call ", f->rax);
    return ENOSYS;
}

// ---- start

static u64 load(void) { // returns where the program's headers are
    const u64 headers = *(u64 *)(file + 32), count = *(u16 *)(file + 56);
    u64 address = 0;
    for (u64 i = 0; i < count; i++) {
        const u64 *header = (const u64 *)(file + headers + 56 * i);
        const u64 loaded = 1, offset = header[1], to = header[2], bytes = header[4], memory = header[5];
        if ((u32)header[0] != loaded) continue;
        memcpy((void *)to, file + offset, bytes);
        memset((void *)(to + bytes), 0, memory - bytes);
        if (offset <= headers && headers < offset + bytes) address = to + headers - offset;
        if (to + memory > heap) heap = to + memory;
    }
    heap = (heap + PAGE - 1) / PAGE * PAGE;
    return address;
}

void main(void) {
    static u64 gates[64];
    static struct { u16 limit; u64 base; } __attribute__((packed)) pointer = {sizeof gates - 1, (u64)gates};
    for (int i = 0; i < 20; i++) {
        const u64 address = (u64)faults + 16 * i;
        gates[2 * i] = (address & 0xffff) | 8 << 16 | 0x8e00ul << 32 | (address >> 16 & 0xffff) << 48;
        gates[2 * i + 1] = address >> 32;
    }
    asm volatile("lidt %0" ::"m"(pointer));
    u64 *const level2 = (u64 *)0x202000;
    for (int i = 0; i < (MAPS_END - MAPS) >> 21; i++) {
        level2[256 + i] = level2[64 + i];
        level2[64 + i] = (u64)(tables + 512 * i) | 3;
    }
    protect(MAPS, MAPS_END - MAPS, 0);
    write_msr(0xc0000081, 8ul << 32); // `syscall`: segments, entry, no flags change
    write_msr(0xc0000082, (u64)syscall_entry);
    write_msr(0xc0000084, 0);

    const u64 entry = *(u64 *)(file + 24), headers = load();
    threads[0].state = READY;
    kernel_rsp = (u64)(threads[0].stack + sizeof threads[0].stack);
    u64 *const stack = (u64 *)(map(STACK, 3) + STACK - PAGE);
    u64 count = 0;
    for (const char *argument = arguments; *argument;) {
        stack[++count] = (u64)argument;
        while (*argument++) {}
    }
    stack[0] = count;
    // after the arguments 0, after no environment 0, then the auxiliary vector: headers, their size and number, the size
    // of a page, the entry, user and group (four times 0), not privileged, 16 random bytes
    const u64 rest[] = {0, 0, 3, headers, 4, 56, 5, *(u16 *)(file + 56), 6, PAGE, 9, entry, 11, 0,
                        12, 0, 13, 0, 14, 0, 23, 0, 25, (u64)stack + 2048, 0, 0};
    memcpy(stack + count + 1, rest, sizeof rest);
    enter(entry, (u64)stack);
}
