# The last 64 KB below 4 GB: from reset to 32 bits, then to the system at 1 MB.
    .code16
    .globl start
start:
    cli
    inb $0x92, %al
    orb $2, %al
    outb %al, $0x92
    lgdtl %cs:gdt_pointer - start
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $8, $protected
    .balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer: .word 23
    .long gdt
    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0xfffe0000, %esi # the system lies in the 64 KB before these
    movl $0x100000, %edi
    movl $0x4000, %ecx
    cld
    rep movsl
    movl $0x100000, %eax
    jmp *%eax
    .org 0xfff0
    .code16
    .byte 0xe9            # jmp start
    .word start - . - 2
    .org 0x10000
