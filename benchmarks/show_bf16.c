/* Lets libraries use bf16 instructions that a hypervisor hides, to measure contenders at their best. For benchmarks only.

   A virtual machine may say through CPUID that its processor has no AVX512_BF16 although the instructions run. oneDNN,
   torch and vLLM then emulate bf16 products, several times slower. Preloaded, this makes CPUID fault (Linux's
   ARCH_SET_CPUID) and answers as the processor does, with that one bit set. It refuses where the instruction itself
   does not run. While it is loaded nobody else can handle SIGSEGV: other handlers would take the place of this one.

       cc -O2 -shared -fPIC benchmarks/show_bf16.c -o .bench/show_bf16.so -ldl
       LD_PRELOAD=$PWD/.bench/show_bf16.so python -m benchmarks.kernels --device cpu ...
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, FAULTS = 0, ANSWERS = 1 };

static void answer_cpuid(int signal_number, siginfo_t* info, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* instruction = (const uint8_t*)registers[REG_RIP];
  if (info->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {  /* not CPUID: a real fault */
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX];
  uint32_t eax = leaf, ebx, ecx = subleaf, edx;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, ANSWERS);
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, FAULTS);
  if (leaf == 7 && subleaf == 0 && eax < 1) eax = 1;  /* subleaf 1 exists */
  if (leaf == 7 && subleaf == 1) eax |= 1u << 5;      /* AVX512_BF16 */
  registers[REG_RAX] = eax, registers[REG_RBX] = ebx, registers[REG_RCX] = ecx, registers[REG_RDX] = edx;
  registers[REG_RIP] += 2;
}

/* Libraries that want to print a trace of a crash install their handlers through these. */
int sigaction(int signal_number, const struct sigaction* wanted, struct sigaction* before) {
  static int (*next)(int, const struct sigaction*, struct sigaction*);
  if (!next) next = (int (*)(int, const struct sigaction*, struct sigaction*))dlsym(RTLD_NEXT, "sigaction");
  const int is_ours = wanted && (wanted->sa_flags & SA_SIGINFO) && wanted->sa_sigaction == answer_cpuid;
  return next(signal_number, signal_number == SIGSEGV && !is_ours ? NULL : wanted, before);
}

sighandler_t signal(int signal_number, sighandler_t wanted) {
  static sighandler_t (*next)(int, sighandler_t);
  if (!next) next = (sighandler_t(*)(int, sighandler_t))dlsym(RTLD_NEXT, "signal");
  return signal_number == SIGSEGV && wanted != SIG_DFL ? SIG_DFL : next(signal_number, wanted);
}

static void refuse(const char* why) {
  fprintf(stderr, "show_bf16: %s\n", why);
  _exit(2);
}

static void no_such_instruction(int signal_number) { refuse("this processor cannot run bf16 instructions"); }

__attribute__((constructor, target("avx512f"))) static void install(void) {
  struct sigaction on_missing = {.sa_handler = no_such_instruction}, before;
  sigaction(SIGILL, &on_missing, &before);
  __asm__ volatile("vpxord %%zmm0, %%zmm0, %%zmm0\n\tvdpbf16ps %%zmm0, %%zmm0, %%zmm0" ::: "xmm0");
  sigaction(SIGILL, &before, NULL);
  struct sigaction on_fault = {.sa_sigaction = answer_cpuid, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &on_fault, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, FAULTS)) refuse("the kernel cannot let CPUID fault (ARCH_SET_CPUID)");
}
