"""Flags that tests give XLA."""

from importlib.metadata import version

# Compiling is nearly all the time tests take, and takes a tenth of it unoptimised. XLA ends a
# process that names a flag it does not know: jaxlib 0.11 has no other emitters any more.
FAST = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"
