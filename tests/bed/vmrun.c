/*
 * Mends how QEMU (7.2 to 11.1 at least) enters a nested guest, from outside.
 *
 * helper_vmrun() of target/i386/tcg/system/svm_helper.c delivers an interrupt that the hypervisor
 * injects, and leaves its vector behind in the CPU's exception_index. If the CPU is next asked to
 * leave its loop before another exception or interrupt has overwritten it, the loop delivers the
 * vector once more: whoever runs by then is interrupted, with interrupts off or not. Guests meet
 * triple faults or stand still by it, and the machine's kernel may run over its own stack.
 *
 * Every VMRUN therefore returns to the loop by the door that resets exception_index. All names are
 * exported by QEMU for its modules; this library is loaded before it.
 */

/* The head of TCGHelperInfo: what translated code calls. */
struct helper {
	void (*call)(void *cpu_state, int address_width, int instruction_length);
};

extern struct helper helper_info_vmrun;
extern __thread void *current_cpu;
void cpu_loop_exit_noexc(void *cpu);

static void (*enter)(void *, int, int);

static void enter_once(void *cpu_state, int address_width, int instruction_length)
{
	enter(cpu_state, address_width, instruction_length);
	cpu_loop_exit_noexc(current_cpu);
}

__attribute__((constructor)) static void mend(void)
{
	enter = helper_info_vmrun.call;
	helper_info_vmrun.call = enter_once;
}
