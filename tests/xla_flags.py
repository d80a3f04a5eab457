"""Flags that tests give XLA."""

from importlib.metadata import version

# Compiling is nearly all the time tests take, and takes a tenth of it unoptimised; in one piece
# a fifth less than in the many pieces that threads would share. XLA ends a process that names a
# flag it does not know: jaxlib 0.11 has no other emitters any more.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"
