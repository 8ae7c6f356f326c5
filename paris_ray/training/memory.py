"""What training needs of a device's memory, from the config alone: weights, and a bound on activations. Imports nothing heavy."""

from __future__ import annotations

from paris_ray.config import ModelConfig, TrainConfig
from paris_ray.training.budget import Inputs

STATE_BYTES = 20
"""For each weight on the device: the weight, its gradient, two moments and the average, in float32."""

BUCKET_BYTES = 4
"""For each weight, where several workers average their gradients: a copy of these in the buckets that are sent."""

CHECKPOINT_BYTES = 16
"""For each weight in a checkpoint: the same without the gradient. A copy of these is in host memory while one is written."""


def fixed_bytes(weights: int, train: TrainConfig, workers: int, host: bool) -> int:
    """What does not grow with the rows: training state; weights cast to bfloat16; where training is on the host, the copies for a checkpoint."""
    each = STATE_BYTES + (BUCKET_BYTES if workers > 1 else 0) + (2 if train.precision == "bf16" else 0) + (CHECKPOINT_BYTES if host else 0)
    return weights * each


def expert_weights(model: ModelConfig, inputs: Inputs) -> int:
    """Numbers in an expert, the fixed table of positions too."""
    d, s, patch = model.hidden_size, int(model.hidden_size * model.mlp_ratio), inputs.channels * model.patch_size**2
    block = 2 * (4 * d * d + 4 * d) + (2 * d * s + s + d) + 6 * d  # two attentions, MLP, table
    final = d * patch + patch + 2 * d
    return _trunk(model, inputs) + inputs.text_width * d + d + 6 * d * d + 6 * d + model.num_layers * block + final


def router_weights(model: ModelConfig, inputs: Inputs, num_experts: int) -> int:
    """Numbers in a router; one that reads no text has ``text_width`` 0."""
    d, s = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    block = (4 * d * d + 4 * d) + (2 * d * s + s + d) + 6 * d * d + 6 * d
    head = d * d + d + 2 * d + d * num_experts + num_experts
    text = inputs.text_width * d + d if inputs.text_width else 0
    return _trunk(model, inputs) + d + text + model.num_layers * block + head


def _trunk(model: ModelConfig, inputs: Inputs) -> int:
    """Patch embedding, positions, time embedding."""
    d = model.hidden_size
    return inputs.channels * model.patch_size**2 * d + d + _tokens(model, inputs) * d + 256 * d + d + d * d + d


def expert_activations(model: ModelConfig, inputs: Inputs, train: TrainConfig) -> int:
    """A bound on the bytes that one image takes in an expert's forward and backward pass, weights aside.

    What autograd keeps of a block, each tensor once: in float32 the inputs of the two norms and what they give; of the size of a matrix product's
    operand the inputs of the five products, queries, keys and values, what attention gives, before and after it is laid out anew, and what the gates
    multiply; of the MLP's width twice; and the text's keys and values. Compiled blocks keep less. On top comes one block once more, for the gradients
    on their way back.
    """
    tokens, d, word = _tokens(model, inputs), model.hidden_size, _word(train)
    text = 2 * inputs.text_tokens * d * word
    block = tokens * d * (4 * 4 + word * (13 + 2 * model.mlp_ratio))
    # Tokens and the last layer in float32; the text as it comes, cast and projected; latent, noise and target; modulation.
    outer = 5 * tokens * d * 4 + inputs.text_tokens * (inputs.text_width * (4 + word) + 2 * d * word) + _latent(inputs) + 20 * d * 4
    return _whole(model, train, block, text, 4 * tokens * d) + int(outer)


def router_activations(model: ModelConfig, inputs: Inputs, train: TrainConfig) -> int:
    """As :func:`expert_activations`, of a router: a token more, no cross-attention, a modulation for each block."""
    tokens, d, word = _tokens(model, inputs) + 1, model.hidden_size, _word(train)
    block = tokens * d * (4 * 4 + word * (9 + 2 * model.mlp_ratio)) + 14 * d * 4
    outer = 3 * tokens * d * 4 + inputs.text_tokens * inputs.text_width * 4 + _latent(inputs) + 20 * d * 4
    return _whole(model, train, block, 0, 4 * tokens * d) + int(outer)


def _whole(model: ModelConfig, train: TrainConfig, block: float, text: int, enters: int) -> int:
    """All blocks and one more; with gradient checkpointing what enters each, and one."""
    kept = enters if train.gradient_checkpointing else block
    return int(model.num_layers * (kept + text) + block)


def _tokens(model: ModelConfig, inputs: Inputs) -> int:
    return (inputs.side // model.patch_size) ** 2


def _word(train: TrainConfig) -> int:
    """Bytes of a matrix product's operand."""
    return 2 if train.precision == "bf16" else 4


def _latent(inputs: Inputs) -> int:
    return 6 * inputs.channels * inputs.side**2 * 4
