"""Formulas of what spreading experts over GPUs costs: bytes on the wire, memory per GPU, seconds, break-even points.

Byte counts are exact for this package's code (tests count what really leaves four ranks). Times divide bytes by
link speeds stated below, each taken at 70 %: an estimate to choose settings by, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4
WEIGHT_BYTES = 4  # the routing weight that travels with a row, and its gradient that returns
COUNT_BYTES = 8  # one int64 per expert says how many rows follow
EFFICIENCY = 0.7


@dataclass(frozen=True)
class Node:
    """A node of 8 GPUs.

    Attributes:
        memory: bytes per GPU. nvlink, network: bytes per second, per GPU and direction. latency: seconds a message.
    """

    name: str
    memory: float
    nvlink: float
    network: float
    gpus: int = 8
    latency: float = 10e-6


NODES = (
    Node("A100-80GB, NVLink 3, 200 Gb/s a GPU", memory=80e9, nvlink=300e9, network=25e9),
    Node("H200, NVLink 4, 400 Gb/s a GPU", memory=141e9, nvlink=450e9, network=50e9),
)


@dataclass(frozen=True)
class Model:
    """Sizes of an encoder-decoder; the defaults are ``xmoe_transformer``.

    Attributes:
        moe_encoder, moe_decoder: layers with experts on each side.
        rows_per_token: kept (token, expert) pairs per token; at most gamma.
        vocabulary: entries of the one joined embedding (--share-all-embeddings).
    """

    embed_dim: int = 512
    ffn_dim: int = 2048
    encoder_layers: int = 12
    decoder_layers: int = 6
    moe_encoder: int = 6
    moe_decoder: int = 3
    num_experts: int = 64
    expert_dim: int = 1024
    rows_per_token: float = 2.0
    vocabulary: int = 32000

    @property
    def moe_layers(self) -> int:
        return self.moe_encoder + self.moe_decoder

    @property
    def expert_parameters(self) -> int:
        """All experts of all layers: w1, b1, w2, b2."""
        width, hidden = self.embed_dim, self.expert_dim
        return self.moe_layers * self.num_experts * (2 * width * hidden + hidden + width)

    @property
    def shared_parameters(self) -> int:
        """What every rank holds: embedding, attention, layer norms, dense FFNs, routers."""
        width, norm = self.embed_dim, 2 * self.embed_dim
        attention = 4 * (width * width + width)
        layers = self.encoder_layers * (attention + 2 * norm) + self.decoder_layers * (2 * attention + 3 * norm)
        dense = self.encoder_layers + self.decoder_layers - self.moe_layers
        dense_ffn = 2 * width * self.ffn_dim + self.ffn_dim + width
        routers = self.moe_layers * self.num_experts * width
        return self.vocabulary * width + layers + dense * dense_ffn + routers


def exchange_bytes(
    rows: float, *, embed_dim: int, num_experts: int, ranks: int, value_bytes: int = FLOAT32, backward: bool = True
) -> float:
    """Bytes that leave all ranks together in one pass through one layer with spread experts.

    Forward: rows and their weights go out, results return. Backward: gradients of the results go out, those of rows and
    weights return. Before them the counts: each rank tells each other one the rows for its experts.

    Args:
        rows: rows whose expert is on another rank than their token, summed over ranks.
        value_bytes: 2 under bf16 or fp16, else 4.
    """
    directions = 4 if backward else 2
    row = directions * embed_dim * value_bytes + (directions // 2) * WEIGHT_BYTES
    return rows * row + (ranks - 1) * num_experts * COUNT_BYTES


def rows_away(rows: float, ranks: int) -> float:
    """Of ``rows``, those for another rank's experts when routing is even."""
    return rows * (ranks - 1) / ranks


def exchange_bytes_per_token(model: Model, ranks: int, value_bytes: int = 2) -> float:
    """All-to-all bytes that leave a GPU for one source and one target token through all layers, forward and backward.

    Without the counts, 8 bytes an expert whatever the number of tokens.
    """
    row = rows_away(model.rows_per_token, ranks)
    layer = exchange_bytes(row, embed_dim=model.embed_dim, num_experts=0, ranks=ranks, value_bytes=value_bytes)
    return layer * model.moe_layers


def gradient_bytes(parameters: int, ranks: int, value_bytes: int = FLOAT32) -> float:
    """Bytes that leave a GPU in a ring all-reduce, once per update."""
    return 2 * (ranks - 1) / ranks * parameters * value_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU in mixed precision with Adam: float32 weights, gradients, two moments."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(model: Model, ranks: int, tokens: int, *, parallel: bool, value_bytes: int = 2) -> Memory:
    """Per GPU, for ``tokens`` source and as many target tokens in one micro-batch.

    What an expert layer keeps for its backward pass is counted from the code: the layer's input, and one pre-activation
    per row and hidden unit; spread experts keep each arrived row instead of the input. Everything else of a transformer
    layer is taken as 16 values of width D a token, and the logits as float32 twice: an estimate.
    """
    held = model.shared_parameters + model.expert_parameters / (ranks if parallel else 1)
    rows = model.rows_per_token * tokens
    kept_inputs = rows if parallel and ranks > 1 else tokens
    expert_layer = kept_inputs * model.embed_dim + rows * model.expert_dim
    dense = model.encoder_layers + model.decoder_layers - model.moe_layers
    values = (
        model.moe_layers * expert_layer
        + dense * 2 * tokens * model.ffn_dim
        + (model.encoder_layers + 1.5 * model.decoder_layers) * 16 * tokens * model.embed_dim
    )
    activations = values * value_bytes + 2 * tokens * model.vocabulary * FLOAT32
    return Memory(held * FLOAT32, held * FLOAT32, 2 * held * FLOAT32, activations)


def reduce_seconds(parameters: int, node: Node, ranks: int) -> float:
    """Ring all-reduce of float32 gradients, not overlapped with computing.

    Over several nodes there is a ring for each of a node's network cards: every card carries one part in ``gpus``,
    while NVLink carries all of them.
    """
    sent = gradient_bytes(parameters, ranks)
    slowest = sent / node.nvlink
    if ranks > node.gpus:
        slowest = max(slowest, sent / node.gpus / node.network)
    return slowest / EFFICIENCY


def exchange_seconds_per_token(model: Model, node: Node, ranks: int, value_bytes: int = 2) -> float:
    """All exchanges of one source and one target token.

    The share for other nodes goes over the GPU's own network card, at the same time the rest over NVLink.
    """
    if ranks == 1:
        return 0.0
    total = exchange_bytes_per_token(model, ranks, value_bytes)
    inside = min(ranks, node.gpus) - 1
    outside = ranks - 1 - inside
    links = (total * inside / (ranks - 1) / node.nvlink, total * outside / (ranks - 1) / node.network)
    return max(links) / EFFICIENCY


def break_even_tokens(model: Model, node: Node, ranks: int, value_bytes: int = 2) -> float:
    """Tokens per GPU and update below which spreading communicates for less time than replicas do.

    The all-reduce of expert gradients happens once an update; the exchange grows with every token, those of all
    micro-batches included.
    """
    everything = model.shared_parameters + model.expert_parameters
    saved = reduce_seconds(everything, node, ranks) - reduce_seconds(model.shared_parameters, node, ranks)
    return saved / exchange_seconds_per_token(model, node, ranks, value_bytes)


def seconds_per_update(model: Model, node: Node, ranks: int, tokens: int, *, parallel: bool) -> float:
    """Communication of one update in bf16, not overlapped with computing."""
    if not parallel:
        return reduce_seconds(model.shared_parameters + model.expert_parameters, node, ranks)
    exchange = tokens * exchange_seconds_per_token(model, node, ranks)
    return reduce_seconds(model.shared_parameters, node, ranks) + exchange


def legacy_ddp_elements(reduced: int, held: int) -> int:
    """Elements that fairseq's legacy_ddp all-reduces when ``reduced`` of the ``held`` parameters of a rank are shared.

    It sends its whole buffer, filled or not, as often as the parameters fill it.
    """
    buffer = min(2**28, held)
    return -(-reduced // buffer) * buffer


def remote_copies(rows_per_token: float, nodes: int, *, once_per_node: bool, node_limit: int | None = None) -> float:
    """Copies of a token's row that cross the network one way, with even and independent routing.

    Args:
        once_per_node: a row goes once to a node and is handed on over NVLink (hierarchical all-to-all).
        node_limit: a token's experts lie on at most this many nodes; needs ``once_per_node`` to save bytes.
    """
    away = (nodes - 1) / nodes
    if not once_per_node:
        return rows_per_token * away
    reached = nodes if node_limit is None else min(node_limit, nodes)
    distinct = reached * (1 - (1 - 1 / reached) ** rows_per_token)
    return distinct * away


def exchange_seconds(model: Model, node: Node, nodes: int, tokens: int, *, hierarchical: bool, copies: float) -> float:
    """One all-to-all of one layer over the network: messages times latency plus bytes over speed."""
    messages = (nodes - 1) * (1 if hierarchical else node.gpus)
    sent = tokens * copies * model.embed_dim * 2
    return messages * node.latency + sent / (node.network * EFFICIENCY)
