"""The MLP of a GPT on an NVIDIA Hopper GPU, in 16 bits: two of its six products with GELU in them.

cuBLAS writes a product to memory, and GELU then waits for memory twice, its gradient three times. Here GELU is applied
to a tile of the product before it is written. Each block of threads has three warpgroups, of 128 threads each. One
loads tiles of the factors into a ring of stages in shared memory; the other two take turns: while one multiplies, on
tensor cores, the other one finishes its tile on ordinary ones and writes it ("ping-pong" in NVIDIA's CUTLASS).

Written in Pallas for Mosaic, JAX's compiler for GPUs. Dimension key: jax_transformer.py; here also K, the numbers that
a product adds up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_gpu_gelu import gelu, gelu_slope

ROWS = 128  # of a tile of the result
STEP = 64  # of the K: a stage holds so many of a tile's rows and columns
PIECE = 32  # columns of a tile that are finished at a time
PIECES = 4  # of them in shared memory, for each warpgroup that multiplies
LOADS = 2  # which of the warpgroups loads
INTERPRET: Any = False  # tests set it: JAX then computes what the kernels say, on a CPU


def fits_mlp(R: int, D: int) -> bool:
    """Whether `mlp` takes R rows, D wide, and this GPU takes `mlp`."""
    return R % ROWS == 0 and D % STEP == 0 and bool(INTERPRET or is_hopper())


def is_hopper() -> bool:
    """Whether this GPU is of the one generation that has these tensor cores' instructions."""
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _cores() -> int:
    return 2 if INTERPRET else jax.devices()[0].core_count


@jax.custom_vjp
def mlp(x_RD: jax.Array, c_fc_DF: jax.Array, c_proj_DF: jax.Array) -> jax.Array:
    """gelu(x @ c_fc) @ c_proj.T, (R, D) in x's type, all of it in one 16-bit type. Its gradient has none itself.

    Raises AssertionError unless R, D and F are made of whole tiles (`fits_mlp`, where F is 4 * D).
    """
    (h_RF,) = _product(_activation, 1, x_RD, c_fc_DF)
    return h_RF @ c_proj_DF.T


def _mlp_forward(x_RD, c_fc_DF, c_proj_DF):
    p_RF, h_RF = _product(_input_and_activation, 2, x_RD, c_fc_DF)
    return h_RF @ c_proj_DF.T, (x_RD, c_fc_DF, c_proj_DF, p_RF, h_RF)


def _mlp_backward(saved, dy_RD):
    x_RD, c_fc_DF, c_proj_DF, p_RF, h_RF = saved
    (dp_RF,) = _product(_input_gradient, 1, dy_RD, c_proj_DF, p_RF)
    return dp_RF @ c_fc_DF.T, x_RD.T @ dp_RF, dy_RD.T @ h_RF


mlp.defvjp(_mlp_forward, _mlp_backward)

_arithmetic = {
    "exp2": jnp.exp2,
    "product_and_sum": lambda x, y, z: x * y + z,
}  # an instruction each, as Mosaic compiles them


def _activation(p):
    return [gelu(p, **_arithmetic)]


def _input_and_activation(p):
    return [p, gelu(p, **_arithmetic)]


def _input_gradient(dh, p):
    return [dh * gelu_slope(p, **_arithmetic)]


# A compiled function of its own, so that Mosaic, which takes two seconds, compiles it for one layer alone.
@functools.partial(jax.jit, static_argnames=("finish", "results"))
def _product(finish, results: int, a_RK: jax.Array, b_KF: jax.Array, x_RF: jax.Array | None = None) -> list[jax.Array]:
    """What `finish` makes of a @ b, or of a @ b and x, element by element: so many arrays (R, F), in a's type.

    It gets float32 numbers and is to return a list.
    """
    (R, K), F, dtype = a_RK.shape, b_KF.shape[1], a_RK.dtype
    columns, stages = (192, 4) if F % 192 == 0 else (128, 5)  # what fits in 227 KB of shared memory
    across, steps, pieces = F // columns, K // STEP, columns // PIECE
    assert R % ROWS == K % STEP == F % columns == 0, f"({R}, {K}) @ ({K}, {F}) is not made of whole tiles"
    tiles = R // ROWS * across
    blocks = min(tiles, _cores())

    def kernel(a_gmem, b_gmem, *refs):
        *gmems, a_smem, b_smem, pieces_smem, arrived, used, x_arrived = refs
        x_gmems, result_gmems = gmems[:-results], gmems[-results:]
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        own_tiles = lax.div(tiles - block + blocks - 1, blocks)

        def place(i):
            """Rows and first column of tile i of this block. Blocks side by side share their rows, in the cache."""
            tile = block + i * blocks
            return pl.ds(lax.div(tile, across) * ROWS, ROWS), lax.rem(tile, across) * columns

        @pl.when(warpgroup == LOADS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, own_tiles)
            def _(i):
                rows, first = place(i)

                @pl.loop(0, steps)
                def _(k):
                    count = i * steps + k
                    stage, of_k = lax.rem(count, stages), pl.ds(k * STEP, STEP)
                    barrier = arrived.at[lax.rem(i, 2) * stages + stage]

                    @pl.when(count >= stages)
                    def _():
                        plgpu.barrier_wait(used.at[stage])

                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, of_k], a_smem.at[stage], barrier)
                    plgpu.copy_gmem_to_smem(b_gmem.at[of_k, pl.ds(first, columns)], b_smem.at[stage], barrier)

            @pl.loop(jnp.maximum(own_tiles * steps - stages, 0), own_tiles * steps)
            def _(count):  # leaves no barrier half used
                plgpu.barrier_wait(used.at[lax.rem(count, stages)])

        def load_x(piece, rows, first):
            buffer = piece % PIECES
            of_piece, barrier = pl.ds(first + piece * PIECE, PIECE), x_arrived.at[warpgroup * PIECES + buffer]
            plgpu.copy_gmem_to_smem(x_gmems[0].at[rows, of_piece], pieces_smem.at[warpgroup, buffer], barrier)

        def finish_and_write(product, rows, first):
            for piece in range(pieces):
                numbers = [product[:, piece * PIECE : (piece + 1) * PIECE]]
                buffers = [(piece * results + result) % PIECES for result in range(results)]
                if x_gmems:  # in whose place comes the result
                    plgpu.barrier_wait(x_arrived.at[warpgroup * PIECES + buffers[0]])
                    numbers.append(pieces_smem[warpgroup, buffers[0]].astype(jnp.float32))
                else:
                    plgpu.wait_smem_to_gmem(PIECES - results, wait_read_only=True)  # until these buffers are free
                for buffer, finished in zip(buffers, finish(*numbers), strict=True):
                    pieces_smem[warpgroup, buffer] = finished.astype(dtype)
                plgpu.commit_smem()
                of_piece = pl.ds(first + piece * PIECE, PIECE)
                for buffer, result_gmem in zip(buffers, result_gmems, strict=True):
                    plgpu.copy_smem_to_gmem(pieces_smem.at[warpgroup, buffer], result_gmem.at[rows, of_piece])
                if x_gmems and 0 < piece <= pieces - PIECES:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before has left its buffer
                    load_x(piece - 1 + PIECES, rows, first)

        @pl.when(warpgroup != LOADS)
        def _multiply_and_finish():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, lax.div(own_tiles - warpgroup + 1, 2))  # every other one
            def _(turn):
                i = 2 * turn + warpgroup
                rows, first = place(i)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left all buffers
                if x_gmems:
                    for piece in range(PIECES):
                        load_x(piece, rows, first)

                @functools.partial(pl.run_scoped, sums=plgpu.ACC((ROWS, columns), jnp.float32))
                def _(sums):
                    @pl.loop(0, steps)
                    def _(k):
                        count = i * steps + k
                        stage = lax.rem(count, stages)
                        plgpu.barrier_wait(arrived.at[warpgroup * stages + stage])
                        plgpu.wgmma(sums, a_smem.at[stage], b_smem.at[stage])
                        plgpu.wgmma_wait(1)  # for the step before, so that the tensor cores always have one to do

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(used.at[lax.rem(count - 1, stages)])

                    product = sums[...]  # waits for the last step
                    plgpu.barrier_arrive(used.at[lax.rem(i * steps + steps - 1, stages)])
                    finish_and_write(product, rows, first)

            plgpu.wait_smem_to_gmem(0)

    def tiled(width):
        """How the tensor cores and the copies to them want rows of so many 16-bit numbers to lie in shared memory."""
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)

    return plgpu.kernel(
        kernel,
        out_type=results * [jax.ShapeDtypeStruct((R, F), dtype)],
        scratch_types=[
            plgpu.SMEM((stages, ROWS, STEP), dtype, transforms=tiled(STEP)),
            plgpu.SMEM((stages, STEP, columns), dtype, transforms=tiled(STEP)),
            plgpu.SMEM((2, PIECES, ROWS, PIECE), dtype, transforms=tiled(PIECE)),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * stages),  # arrived: of a and of b, for each warpgroup
            plgpu.Barrier(num_barriers=stages),  # used
            plgpu.Barrier(num_barriers=2 * PIECES),  # x_arrived
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=INTERPRET,
    )(a_RK, b_KF, *([] if x_RF is None else [x_RF]))
