"""The command as a module, for launchers that take one: `torchrun --nproc-per-node 2 -m taq_vllm.cli score ...`."""

from taq_vllm.cli import main

if __name__ == "__main__":
    main()
