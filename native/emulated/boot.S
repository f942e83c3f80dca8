# From 32 bits to 64: pages, SSE, AVX and whatever XCR0 may hold; then main. And the entries of system calls and faults.
    .section .boot, "ax"
    .code32
    .globl _start
_start:
    cld
    movl $0x380000, %esp
    # pages: level 4 at 0x200000, level 3 at 0x201000, level 2 at 0x202000 (1 GB of 2 MB pages)
    movl $0x200000, %edi
    xorl %eax, %eax
    movl $4096, %ecx
    rep stosl
    movl $0x201003, 0x200000
    movl $0x202003, 0x201000
    movl $0x202000, %edi
    movl $0x83, %eax
1:  movl %eax, (%edi)
    addl $8, %edi
    addl $0x200000, %eax
    cmpl $0x40000083, %eax
    jne 1b
    # and the last 4 MB below 4 GB, the ROM, by the level 2 at 0x203000
    movl $0x203003, 0x201018
    movl $0xffc00083, 0x203ff0
    movl $0xffe00083, 0x203ff8
    movl $0x200000, %eax
    movl %eax, %cr3
    movl $0x406a0, %eax    # PAE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x101, %eax       # LME, SCE
    wrmsr
    movl $0x80010033, %eax # paging, write protection, no emulation of the FPU
    movl %eax, %cr0
    lgdt pointer
    ljmp $8, $long
    .balign 8
gdt: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
pointer: .word 23
    .quad gdt
    .code64
long:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0xd, %eax        # every state that the processor knows
    xorl %ecx, %ecx
    cpuid
    xorl %ecx, %ecx
    xsetbv
    movq $0x380000, %rsp
    call main
    hlt

    .text
    .globl syscall_entry, switch_to, thread_start, enter
    # rcx is where to return, r11 the flags. Everything runs in ring 0.
syscall_entry:
    movq %rsp, user_rsp
    movq kernel_rsp, %rsp
    pushq user_rsp
    pushq %rcx
    pushq %r11
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %r10
    pushq %r8
    pushq %r9
    pushq %rax
    movq %rsp, %rdi
    call syscall
    movq %rax, (%rsp)
thread_start:
    popq %rax
    popq %r9
    popq %r8
    popq %r10
    popq %rdx
    popq %rsi
    popq %rdi
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    popfq
    popq %rcx
    popq %rsp
    jmp *%rcx

    # switch_to(where to keep rsp, new rsp)
switch_to:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

    # enter(rip, rsp)
enter:
    movq %rsi, %rsp
    xorl %edx, %edx
    xorl %ebp, %ebp
    jmp *%rdi

    .macro fault number code
    .balign 16
    .if \code == 0
    pushq $0
    .endif
    pushq $\number
    jmp common
    .endm
    .globl faults
    .balign 16
faults:
    fault 0 0
    fault 1 0
    fault 2 0
    fault 3 0
    fault 4 0
    fault 5 0
    fault 6 0
    fault 7 0
    fault 8 1
    fault 9 0
    fault 10 1
    fault 11 1
    fault 12 1
    fault 13 1
    fault 14 1
    fault 15 0
    fault 16 0
    fault 17 1
    fault 18 0
    fault 19 0
common:
    movq %rsp, %rdi
    movq %cr2, %rsi
    jmp fault
