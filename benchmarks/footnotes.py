"""What the figures of a result file mean: the footnotes that every file carries."""

from __future__ import annotations

FOOTNOTES = {
    "ms": "milliseconds of a call: on a GPU between two CUDA events, the calls enqueued in bursts after one "
    "that is not timed, so the longer of the GPU's time and the host's to launch; on a CPU by the clock on "
    "the wall. Median, p20, p80",
    "graph_ms": "milliseconds of a call inside a CUDA graph that holds one call for every input, up to 512: "
    "no launch costs the host anything; none of calls above 20 ms. The fused side packs its weights, those "
    "that it does not read as they are, in every call there, because a graph's replays must follow the "
    "weights; the ms of a forward holds no packing, and nothing at level kernel does. compile_max_autotune "
    "is captured without its own CUDA graphs",
    "inputs": "random normal numbers, on a GPU rotated through twice the L2 cache's size, at level model "
    "through up to 4 batches of images, at level kernel up to 128 inputs. Smaller ones may stay in L2 where "
    "these limits, or the 512 calls of a CUDA graph, come first; flax always has one input, and at level "
    "kernel cublas and copy have buffers of their own. The weights may stay in L2",
    "flops": "token 4 B S C D, channel 4 B S C E, block their sum, model: its blocks, patch embedding and "
    "head; three times that with a backward. Recomputed products do not count as work done. At level kernel "
    "the products that the kernel does, recomputed ones too; padding never counts",
    "bytes": "itemsize * (2 B S C + parameters): x and weights read once, y written once. With a backward "
    "itemsize * (5 B S C + 3 parameters): it starts when all of y exists, and x and weights do not stay on "
    "the chip so long, so they are read again; the gradient of y read, those of x and the weights written. A "
    "model: 2 or 5 B S C a block and for the embedding and the head together, and the images likewise. At "
    "level kernel every tensor that the launch is given, once. Tensors are fp32 under autocast",
    "rates": "tflop_per_s and gb_per_s: flops and bytes over the median, graph_ms's where there is one; of "
    "copy no flops, of cublas no bytes, and of neither a share of the roofline",
    "share_of_roofline": "max(flops / product_tflop_per_s, bytes / copy_gb_per_s) over the median, "
    "graph_ms's where there is one; the ceilings are this file's, measured in the same run",
    "ratio_to_best": "median of the best of eager, compile and compile_max_autotune over that of fused, of "
    "graph_ms where both have one: above 1 fused is faster",
    "parity": "err = ||a - truth|| / ||truth|| with an fp64 truth; err_fused <= 1.25 err_eager + 8 eps, "
    "max_fused <= 2 max_eager + 16 eps max |truth|; for the output and each gradient on its own, at level "
    "model the logits and the images' gradient, of up to 64 samples spread over the batch. The figures are "
    "those of the tensor nearest its bound",
    "peak_bytes": "max_memory_allocated during one call after a warm-up, minus what was allocated before: "
    "what is kept for the backward, temporaries, packed weights, the output and the gradients; not the "
    "inputs, the weights and what fused_frozen packed before. compile_max_autotune is weighed without CUDA "
    "graphs",
    "launches": "kernels that the profiler saw in one call, without copies and fills",
    "fused": "the weights are packed in every call, by a launch of its own; fused_frozen packed them before. "
    "fused_lean keeps no pre-activation. The halves and kernels are fastmixer's own launches even where a "
    "block would choose PyTorch for them",
    "kernel": "a launch of a fused block, run again on the buffers it was recorded with; its gate is the "
    "block's. cublas: the bare product on random matrices; copy: as many bytes as the launch is given",
    "channel": "alone, the half computes its row moments; inside a block the token half leaves them",
    "cublas": "the channel half's matrix products alone, 2 forward and 4 more backward",
    "copy": "the token half's activations moved and nothing else: a copy, with a backward also an addition",
    "lucidrains": "mlp-mixer-pytorch's modules built with the case's sizes and random weights of their own",
    "flax": "flax.linen, jitted, forward only: time on the wall until the result is ready, host included",
    "vit": "timm's ViT of the same size, patch and images: another network, with flops and parameters of its "
    "own",
    "predicted_ms": "of fused, by fastmixer's cost model: the sum of its launches, each under its name too, "
    "without packing weights, sums of partials and what the host takes; of a model its blocks alone",
}
