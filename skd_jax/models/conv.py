"""Convolutions of the networks: He-initialised, NHWC, with fast gradients, doubling at no cost."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax.compiler import platform

Padding = Sequence[tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_IMAGES = 16  # that the weight gradient takes at a time
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: Padding = (),
    precision: str = "highest",
) -> jax.Array:
    """Convolves ``x`` [B, H, W, I] with ``kernel`` [h, w, I, O].

    On a CPU it has gradients in reverse mode only (``jax.grad``, not ``jax.jvp``).

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O].
      stride: step in pixels.
      padding: pixels before and after, of rows and of columns; the default is h // 2 and w // 2 on
        each side, PyTorch's, which at stride 2 differs from XLA's "SAME".
      precision: of products of float32, in the gradients too: "highest" is float32; with "high" and
        "default" accelerators may round the factors to TensorFloat-32 or bfloat16.

    Returns:
      [B, H', W', O].
    """
    padding = tuple(padding) or tuple((size // 2, size // 2) for size in kernel.shape[:2])
    kernel = kernel.astype(x.dtype)
    if platform() == "cpu":
        return _cpu_conv(x, kernel, stride, padding, precision)
    return _conv(x, kernel, stride, padding, precision)


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Padding,
    precision: str,
    dilation: int = 1,
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=_DIMENSIONS,
        precision=precision,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _cpu_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: str
) -> jax.Array:
    """A convolution whose gradients XLA's CPU backend runs at about the forward's rate.

    That backend has one fast convolution, of [B, H, W, I] with [h, w, I, O] in this very order.
    JAX's own gradients come in other orders. Those at the top level of a program are put right by
    transposing, which for the weights' gradient costs several times the forward; those inside a
    loop are not, and run a hundred times slower. Where results have few channels it leaves most of
    its lanes idle, and :func:`_by_taps` is several times as fast.
    """
    if _few_results(kernel, x, stride):
        return _by_taps(x, kernel, padding, precision)
    return _conv(x, kernel, stride, padding, precision)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _cpu_conv(x, kernel, stride, padding, precision), (x, kernel)


def _backward(
    stride: int,
    padding: Padding,
    precision: str,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    edges = []
    for size, taps, out, (before, _) in zip(
        x.shape[1:3], kernel.shape[:2], dy.shape[1:3], padding, strict=True
    ):
        left = taps - 1 - before
        edges.append((left, size + taps - 1 - left - (stride * (out - 1) + 1)))
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    if _few_results(kernel, x, stride):
        return _by_neighbours(x, dy, flipped, edges, precision)
    if _few_results(flipped, dy, stride):
        dx = _by_taps(dy, flipped, edges, precision)
    else:
        dx = _conv(dy, flipped, 1, edges, precision, dilation=stride)
    return dx, _weight_gradient(x, dy, kernel, stride, padding, precision)


_cpu_conv.defvjp(_forward, _backward)


def _few_results(kernel: jax.Array, x: jax.Array, stride: int) -> bool:
    """Whether results have few channels; images of up to 8x8 pixels are done with soon anyway."""
    return stride == 1 and kernel.shape[3] <= 4 and math.prod(x.shape[1:3]) > 64


def _by_taps(x: jax.Array, kernel: jax.Array, padding: Padding, precision: str) -> jax.Array:
    """A convolution of stride 1 as one matrix product of every pixel with every tap, then sums."""
    height, width, inputs, outputs = kernel.shape
    taps = kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
    products = _product(x, taps, precision)
    products = jnp.pad(products, ((0, 0), *padding, (0, 0)))
    rows, columns = products.shape[1] - height + 1, products.shape[2] - width + 1
    total = jnp.zeros((), products.dtype)
    for tap, (i, j) in enumerate(itertools.product(range(height), range(width))):
        of_tap = slice(tap * outputs, (tap + 1) * outputs)
        total += products[:, i : i + rows, j : j + columns, of_tap]
    return total.astype(x.dtype)


def _by_neighbours(
    x: jax.Array, dy: jax.Array, flipped: jax.Array, padding: Padding, precision: str
) -> tuple[jax.Array, jax.Array]:
    """The gradients of :func:`_by_taps` as matrix products with each pixel's neighbours in ``dy``.

    Args:
      x: [B, H, W, I].
      dy: [B, H', W', O], of few channels.
      flipped: the kernel turned by 180 degrees, [h, w, O, I].
      padding: around ``dy``.
      precision: see :func:`conv`.

    Returns:
      Those of ``x`` and of the kernel [h, w, I, O].
    """
    height, width, outputs, inputs = flipped.shape
    rows, columns = x.shape[1:3]
    dy = jnp.pad(dy, ((0, 0), *padding, (0, 0)))
    taps = itertools.product(range(height), range(width))
    neighbours = [dy[:, i : i + rows, j : j + columns] for i, j in taps]
    neighbours = jnp.concatenate(neighbours, axis=-1)  # [B, H, W, h w O]
    dx = _product(neighbours, flipped.reshape(-1, inputs), precision)
    of_taps = _product(
        neighbours.reshape(-1, height * width * outputs).T, x.reshape(-1, inputs), precision
    )
    d_kernel = of_taps.reshape(flipped.shape)[::-1, ::-1].transpose(0, 1, 3, 2)
    return dx.astype(x.dtype), d_kernel.astype(x.dtype)


def _product(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    """A matrix product that is summed in float32 at least."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)


def _weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Padding,
    precision: str,
) -> jax.Array:
    """The gradient of ``kernel``: ``x`` convolved with ``dy``, channels and examples swapped.

    A few images at a time, which stay in the cache while they are swapped and gone over.
    """
    edges = []
    for size, taps, out, (before, _) in zip(
        x.shape[1:3], kernel.shape[:2], dy.shape[1:3], padding, strict=True
    ):
        edges.append((before, taps + stride * (out - 1) - size - before))

    def add(total: jax.Array, some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, dy = some
        product = jax.lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),
            dy.transpose(1, 2, 0, 3),
            (1, 1),
            edges,
            rhs_dilation=(stride, stride),
            dimension_numbers=_DIMENSIONS,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    def grouped(a: jax.Array) -> jax.Array:
        images = min(len(a), _IMAGES)
        a = jnp.pad(a, ((0, -len(a) % images), (0, 0), (0, 0), (0, 0)))  # zeros add nothing
        return a.reshape(-1, images, *a.shape[1:])

    some = (grouped(x), grouped(dy))
    height, width, inputs, outputs = kernel.shape
    zero = jnp.zeros_like(dy[0, 0, 0, 0], jnp.float32)  # of dy, so as varied over devices
    zero = jnp.broadcast_to(zero, (inputs, height, width, outputs))
    total, _ = jax.lax.scan(add, zero, some)
    return total.transpose(1, 2, 0, 3).astype(kernel.dtype)


def upsample_conv(x: jax.Array, kernel: jax.Array, precision: str = "highest") -> jax.Array:
    """A 3x3 convolution after nearest x2 upsampling, computed on the small image.

    On a CPU: an output pixel sees 3 rows of the doubled image, which are 2 rows of the small one.
    So each of the four phases of the output (even and odd rows and columns) is a 2x2 convolution of
    ``x`` with summed taps: the same numbers to float32 rounding for 4/9 of the multiplications.
    Elsewhere interleaving them would take longer than that, and it is one transposed convolution of
    stride 2, by the kernel convolved with 2x2 ones.

    Args:
      x: [B, H, W, I].
      kernel: [3, 3, I, O].
      precision: see :func:`conv`.

    Returns:
      [B, 2H, 2W, O].
    """

    def turned(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        return [c, b + c, a + b, a]

    def even(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        return [a, b + c]

    def odd(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        return [a + b, c]

    if platform() != "cpu":
        return _transposed(x, _tapped(kernel, turned, turned).astype(x.dtype), (2, 2), precision)
    return _phases(x, kernel, ((even, (1, 0)), (odd, (0, 1))), precision)


def transposed_conv(x: jax.Array, kernel: jax.Array, precision: str = "highest") -> jax.Array:
    """A 3x3 transposed convolution of stride 2, ``flax.linen.ConvTranspose``'s with "SAME".

    On a CPU the zeros between the pixels are left out: an even row of the output sees two rows of
    ``x``, an odd row one.

    Args:
      x: [B, H, W, I].
      kernel: [3, 3, I, O].
      precision: see :func:`conv`.

    Returns:
      [B, 2H, 2W, O].
    """

    def turned(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        return [c, b, a]

    def even(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        del b
        return [a, c]

    def odd(a: jax.Array, b: jax.Array, c: jax.Array) -> list[jax.Array]:
        del a, c
        return [b]

    if platform() != "cpu":
        return _transposed(x, _tapped(kernel, turned, turned).astype(x.dtype), (2, 1), precision)
    return _phases(x, kernel, ((even, (1, 0)), (odd, (0, 0))), precision)


def _tapped(kernel: jax.Array, row_taps: Callable, column_taps: Callable) -> jax.Array:
    """A kernel of other taps, made of the rows and columns of ``kernel`` [3, 3, I, O]."""
    kept = jnp.stack(row_taps(*kernel))
    return jnp.stack(column_taps(*kept.swapaxes(0, 1)), axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _transposed(
    x: jax.Array, turned: jax.Array, padding: tuple[int, int], precision: str
) -> jax.Array:
    """A transposed convolution of stride 2, whose gradients are those of the one it transposes.

    XLA takes it for cuDNN's transposed convolution if its kernel is reversed here, and else
    multiplies zeros; as do JAX's own gradients.

    Args:
      x: [B, H, W, I].
      turned: the kernel [h, w, I, O] turned by 180 degrees, of x's dtype.
      padding: of rows and of columns alike, around the pixels of ``x`` with a zero between them.
      precision: see :func:`conv`.
    """
    kernel = jax.lax.rev(turned, (0, 1))
    return _conv(x, kernel, 1, (padding, padding), precision, dilation=2)


def _transposed_forward(
    x: jax.Array, turned: jax.Array, padding: tuple[int, int], precision: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _transposed(x, turned, padding, precision), (x, turned)


def _transposed_backward(
    padding: tuple[int, int],
    precision: str,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, turned = saved
    before, after = (len(turned) - 1 - pixels for pixels in padding)

    def strided(turned: jax.Array) -> jax.Array:
        kernel = turned.swapaxes(2, 3)
        return _conv(dy, kernel, 2, ((before, after),) * 2, precision)

    dx, by_turned = jax.vjp(strided, turned)
    return dx, by_turned(x)[0]


_transposed.defvjp(_transposed_forward, _transposed_backward)


def _phases(x: jax.Array, kernel: jax.Array, phases: Sequence, precision: str) -> jax.Array:
    """A doubled image, interleaved from convolutions of ``x``: one for each pair of phases.

    Args:
      x: [B, H, W, I].
      kernel: [3, 3, I, O].
      phases: of even and odd rows or columns, the taps made of the kernel's three, and the padding.
      precision: see :func:`conv`.
    """
    out = []
    for row_taps, rows in phases:
        for column_taps, columns in phases:
            kept = _tapped(kernel, row_taps, column_taps)
            out.append(conv(x, kept, padding=(rows, columns), precision=precision))
    batch, height, width, _ = x.shape
    interleaved = jnp.stack(out, axis=3).reshape(batch, height, width, 2, 2, -1)
    return interleaved.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)


class Conv(nn.Module):
    """A convolution with a [size, size, I, features] kernel, He (fan-out) initialised.

    Attributes:
      features: output channels.
      size: height and width of the kernel, pixels.
      stride: step in pixels.
      bias: add a bias, zero at first.
      double: double the image, which needs size 3 and stride 1: "resize" (nearest) before the
        convolution, or "transposed", a transposed convolution.
      precision: see :func:`conv`.
    """

    features: int
    size: int = 3
    stride: int = 1
    bias: bool = False
    double: str = ""
    precision: str = "highest"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, I] to [B, H / stride, W / stride, features], or twice the size."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape, jnp.float32)
        if self.double == "resize":
            y = upsample_conv(x, kernel, self.precision)
        elif self.double == "transposed":
            y = transposed_conv(x, kernel, self.precision)
        else:
            y = conv(x, kernel, self.stride, precision=self.precision)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, None]
        return y
