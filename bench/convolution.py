"""The encoder's first block, forward and backward, computed in several ways: seconds an excerpt and the
difference; `make bench BENCH=convolution`, or with a size's name for that one alone."""
import sys

import torch
from report import report, row, seconds
from scipy.fft import next_fast_len
from torch.nn import functional as F

from deepdemix.pretraining import conv_block

SIZES = {"laptop": (4, 8), "paper": (16, 32)}


class FFTConvolution(torch.autograd.Function):
    """A padded convolution by overlap-save along time: maps (b, c, t, f) and kernels (o, c, kt, kf), exact
    up to rounding."""

    @staticmethod
    def forward(ctx, x, weight, tile):
        (b, c, frames, n_f), (o, _, kt, kf) = (x.shape[0], x.shape[1], x.shape[2] - weight.shape[2] + 1,
                                               x.shape[3] - weight.shape[3] + 1), weight.shape
        tiles = -(-frames // tile)
        size = (next_fast_len(tile + kt - 1), next_fast_len(n_f + kf - 1, real=True))
        pieces = (
            F.pad(x, (0, 0, 0, tiles * tile - frames)).unfold(2, tile + kt - 1, tile).permute(0, 2, 1, 4, 3)
        )
        spectrum = torch.fft.rfft2(pieces, size).reshape(b * tiles, c, -1).permute(2, 0, 1)
        kernels = torch.fft.rfft2(weight, size).conj().reshape(o, c, -1).permute(2, 1, 0)
        ctx.save_for_backward(spectrum, kernels)
        ctx.sizes = b, c, o, frames, n_f, kt, kf, tiles, tile, size
        y = (spectrum @ kernels).permute(1, 2, 0).reshape(b, tiles, o, size[0], -1)
        y = torch.fft.irfft2(y, size)[..., :tile, :n_f]
        return y.permute(0, 2, 1, 3, 4).reshape(b, o, tiles * tile, n_f)[:, :, :frames]

    @staticmethod
    def backward(ctx, g):
        (spectrum, kernels), (b, c, o, frames, n_f, kt, kf, tiles, tile, size) = ctx.saved_tensors, ctx.sizes
        g = F.pad(g, (0, 0, 0, tiles * tile - frames)).unflatten(2, (tiles, tile)).transpose(1, 2)
        g = torch.fft.rfft2(g, size).reshape(b * tiles, o, -1).permute(2, 0, 1)
        weight = (g.transpose(1, 2).conj() @ spectrum).permute(1, 2, 0).reshape(o, c, size[0], -1)
        weight = torch.fft.irfft2(weight, size)[..., :kt, :kf]
        if not ctx.needs_input_grad[0]: return None, weight, None
        x = (g @ kernels.conj().transpose(1, 2)).permute(1, 2, 0).reshape(b, tiles, c, size[0], -1)
        x = torch.fft.irfft2(x, size)[..., :tile + kt - 1, :n_f + kf - 1].permute(0, 2, 1, 3, 4)
        whole = x.new_zeros(b, c, tiles * tile + kt - 1, x.shape[-1])
        for k in range(tiles): whole[:, :, k * tile:(k + 1) * tile + kt - 1] += x[:, :, k]
        return whole[:, :, :frames + kt - 1], weight, None


def by_fft(block, x, tile=120):
    "The block with its two convolutions by FFT."
    for layer in block[:4:2]:
        kt, kf = layer.kernel_size
        x = F.pad(x, ((kf - 1) // 2, kf // 2, (kt - 1) // 2, kt // 2))
        x = F.relu(FFTConvolution.apply(x, layer.weight, tile) + layer.bias[:, None, None])
    return block[4](x)


def plainly(block, x):
    "The block as torch computes it when left alone."
    for layer in block[:4:2]:
        kt, kf = layer.kernel_size
        x = F.relu(
            F.conv2d(F.pad(x, ((kf - 1) // 2, kf // 2, (kt - 1) // 2, kt // 2)), layer.weight, layer.bias)
        )
    return block[4](x)


def pooled_first(block, x):
    "The block with the last ReLU after the pooling: the same maps, since both keep order."
    return F.relu(block[4](block[2](block[1](block[0](x)))))


def everything(batch=2):
    "All rows."
    for name, channels in SIZES.items():
        torch.manual_seed(0)
        block = conv_block(1, *channels, ((8, 16), (8, 16)), (16, 4), dropout=0.0)
        x = torch.randn(batch, 1, 1724, 257)
        ways = {"plain, single precision": (lambda x: plainly(block, x), False),
                "plain, bfloat16": (lambda x: plainly(block, x), True),
                "FFT": (lambda x: by_fft(block, x), False), "folded, single precision": (block, False),
                "folded, bfloat16": (block, True),
                "folded, bfloat16, ReLU after the pooling": (lambda x: pooled_first(block, x), True)}
        if name == "laptop":
            ways["plain, bfloat16, compiled"] = torch.compile(lambda x: plainly(block, x)), True
        first = None
        for way, (call, low) in ways.items():
            def step():
                block.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=low): y = call(x).float()
                y.square().mean().backward()
                return torch.cat([y.detach().flatten(), block[2].weight.grad.flatten() * 1e6])
            try: found = step()
            except Exception as error:
                yield row(f"{name}, {way}", None, "",
                          note=f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
                continue
            taken = seconds(step, 3) / batch
            if first is None: first = found, taken
            apart = float((found - first[0]).norm() / first[0].norm())
            yield row(f"{name}, {way}", taken, "s/excerpt", "plain, single precision", first[1],
                      note=f"relative difference {apart:.0e}") | dict(difference=apart)


if __name__ == "__main__":
    SIZES = {k: v for k, v in SIZES.items() if k in (sys.argv[1:] or SIZES)}
    report("convolution", everything())
