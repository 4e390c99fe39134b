"""How XLA is told to compile this network: options that the program sets so that the user need not know of them."""

import functools
import os

import jax

_OPTIONS: dict[str, dict[str, str | bool]] = {
    # YNNPACK takes three to four times as long as Eigen for the gradients of convolutions (JAX 0.10.2). What is beyond
    # the first level of optimisation costs a fifth of the time to compile, and steps are no faster for it.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "", "xla_backend_optimization_level": "1"},
    # XLA leaves 3-D convolutions channels-first, and cuDNN then transposes before and after each of them. Triton's
    # matrix products gain little over cuBLAS' here and take much of the time to compile, as does comparing the results
    # of all algorithms, which the levels 3 and 4 of autotuning add.
    "gpu": {"xla_gpu_force_conv_nhwc": True, "xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "2"},
}

# The scheduler that hides the time of collectives keeps much more in memory for it: two GPUs with split parameters took
# 12.8 GiB and 118.5 ms a step with it, 7.9 GiB and 120.4 ms without (docs/performance.md).
_LESS_MEMORY: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": False}}


@functools.cache
def compiler_options(less_memory: bool = False) -> dict[str, str | bool]:
    """The `compiler_options` of jax.jit on the default backend.

    Without those that this jaxlib does not know, and without those that the user has set in XLA_FLAGS.
    less_memory: at the cost of some time, on several devices.
    """
    backend = jax.default_backend()
    wanted = _OPTIONS.get(backend, {}) | (_LESS_MEMORY.get(backend, {}) if less_memory else {})
    users = {flag.lstrip("-").split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in wanted.items() if name not in users and _known({name: value})}


def _known(options: dict[str, str | bool]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
