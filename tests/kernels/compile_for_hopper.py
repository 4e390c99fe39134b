"""Compile to sm_90a machine code where there is no GPU: the scan's kernels of one DTYPE, or those of "conv3d".

A program of its own, since the compiler's reports are switched on by environment variables that are read once.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  device_address_bits: 64
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  name: "NVIDIA H200"
}
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 12 }  device_description_str: "NVIDIA H200"
"""


def programs(which: str):
    """(function, arguments as shapes)."""
    if which == "conv3d":
        from mambahome_kernels.mosaic import runtime

        from tests.kernels import test_conv3d

        runtime.default_device = test_conv3d.GPU
        return [(test_conv3d.on_gpu, test_conv3d.shapes(*variant)) for variant in test_conv3d.VARIANTS]
    from tests.kernels.test_mosaic_gpu import VARIANTS, both, shapes

    inputs = [shapes(*variant) for variant in VARIANTS if variant[0] == which]
    return [(both, (i, i.x)) for i in inputs]


def main() -> None:
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    everywhere = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    jax.block_until_ready(jnp.zeros(()))
    for function, arguments in programs(sys.argv[1]):
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
        jax.jit(function).trace(*placed).lower().compile()


if __name__ == "__main__":
    main()
