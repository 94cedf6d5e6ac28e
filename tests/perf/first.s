# A "kernel" that only says that the guest runs: its first instructions write READY to the serial
# port, then it resets the machine. Written in instructions that mean the same in 64-bit mode, in
# which bulkhead-vmm starts a kernel, and in 32-bit mode, in which QEMU starts one by its PVH note.
	.section .note.Xen, "a", @note
	.long	4, 4, 18		# XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	_start

	.text
	.globl	_start
_start:
	mov	$0x3f8, %edx
	.irp	letter, 0x52, 0x45, 0x41, 0x44, 0x59, 0x0a
	mov	$\letter, %al
	out	%al, (%dx)
	.endr
	mov	$0x64, %edx		# the keyboard controller's reset line
	mov	$0xfe, %al
	out	%al, (%dx)
	mov	$stack, %esp		# where there is none: a fault without a table to handle it
	.byte	0x6a, 0, 0x6a, 0	# push 0, twice
	.byte	0x0f, 0x01, 0x1c, 0x24	# lidt of what was pushed
	int3

	.bss
	.skip	64
stack:
	.skip	16
