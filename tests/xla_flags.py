"""Flags that tests give XLA."""

from importlib.metadata import version

# Compiling is nearly all the time tests take, and takes a tenth of it unoptimised.
FAST = "--xla_backend_optimization_level=0"
# Nor are programs cut up for many threads to compile, where two processes have two cores.
FAST += " --xla_cpu_parallel_codegen_split_count=1"
# XLA ends a process that names a flag it does not know: jaxlib 0.11 has no other emitters any more.
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"
