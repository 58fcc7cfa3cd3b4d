"""What an iteration costs for large policies and many conversations: memory, floating-point operations, GPU-hours, bytes.

Nothing is measured here. Everything follows from the assumptions below, each of which is an option, and from the shapes of
three published models; docs/scaling.md holds what it prints and says what was never run.

    python benchmarks/scaling_arithmetic.py
    python benchmarks/scaling_arithmetic.py --mfu 0.25 --turns 20 --gpus 64

Prints the tables as Markdown and, last, one JSON object with the figures of the last table.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Trained = Literal["adapter", "bfloat16", "float32"]
"""What is trained: adapters in float32 on frozen bfloat16, or all weights in one of the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a conversation, a GPU and an iteration are; an option of the command each."""

    turns: int = 8
    """Responses in a conversation."""
    system_tokens: int = 200
    """Tokens of the system message, the template's included; so below."""
    user_tokens: int = 40
    """Tokens of a message of the customer."""
    response_tokens: int = 60
    """Tokens of a response."""
    bytes_per_token: float = 4.0
    """Bytes of text a token."""
    bytes_per_message: float = 80.0
    """JSON around a message: role, log-probability, quotes."""
    peak_tflops: float = 989.0
    """Dense bfloat16 peak of a GPU, TFLOP/s: an H100 SXM."""
    mfu: float = 0.4
    """Share of the peak that training and scoring reach."""
    gpu_gigabytes: float = 80.0
    """Memory of a GPU."""
    bandwidth_terabytes: float = 3.35
    """Of that memory, a second."""
    bandwidth_share: float = 0.5
    """Share of it that decoding reaches."""
    lockstep: int = 512
    """Most conversations that are decoded together (compute.rollout_conversations)."""
    tokens_per_batch: int = 4096
    """Tokens in one gradient pass (compute.tokens_per_batch)."""
    lora_rank: int = 16
    """policy.lora_rank."""
    fit_passes: int = 1
    """q_function.refit_passes; the first fit takes up to four."""
    num_updates: int = 6
    """improvement.num_updates."""
    prompts_per_update: int = 512
    """improvement.prompts_per_update."""
    num_samples: int = 2
    """improvement.num_samples."""
    num_passes: int = 2
    """improvement.num_passes."""
    evaluation_conversations: int = 1000
    """evaluation.conversations, with each of two policies."""
    host_bytes_per_token: float = 78.0
    """Of a token of the log in the processor's memory, in the stage that needs most: benchmarks/host_memory.py."""
    gpus: int = 8
    """For the hours in the last column."""

    @property
    def conversation_tokens(self) -> int:
        return self.system_tokens + self.turns * (self.user_tokens + self.response_tokens)

    @property
    def sampled_tokens(self) -> int:
        """Tokens of the policy in a conversation."""
        return self.turns * self.response_tokens

    @property
    def answered_tokens(self) -> int:
        """Tokens of new responses to all prompts of a conversation."""
        return self.num_samples * self.sampled_tokens

    @property
    def tree_tokens(self) -> int:
        """A conversation and new responses to all of its prompts, what they share counted once."""
        return self.conversation_tokens + self.answered_tokens

    @property
    def flop_per_second(self) -> float:
        return self.peak_tflops * 1e12 * self.mfu


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder of the Llama 3 family.

    Example:
        Shape(name="8B", layers=32, width=4096, heads=32, kv_heads=8, head_width=128, feed_forward=14336, tied=False)
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    tied: bool
    """Whether the output embedding is the input embedding."""
    vocabulary: int = 128_256

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's matrices, each of which multiplies every token."""
        attention = 2 * self.width * self.attention_width + 2 * self.width * self.kv_width
        return attention + 3 * self.width * self.feed_forward

    @property
    def output_matrix(self) -> int:
        """Parameters of the output embedding, which multiplies the tokens that are predicted."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        embeddings = self.output_matrix * (1 if self.tied else 2)
        norms = (2 * self.layers + 1) * self.width
        return self.layers * self.layer_matrices + embeddings + norms

    def adapter_parameters(self, rank: int) -> int:
        """LoRA on all linear layers: rank · (in + out) for each."""
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.feed_forward
        return self.layers * rank * (2 * (d + a) + 2 * (d + k) + 3 * (d + f))

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * 2 * self.layers * self.kv_width

    def layer_activation_bytes(self, trained: Trained) -> int:
        """What one layer keeps of a token for its backward pass; attention keeps no scores.

        Both norms their input in float32, and where their scale is trained the normed values; their results (4 d, 2 d and 2 d
        bytes in bfloat16) where a matrix behind them is trained; queries, keys, values and the attention's result; gate, its
        activation, up and, for the matrix behind it, their product. An adapter keeps the input of each of its seven
        layers in float32, and the frozen matrices keep none.
        """
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.feed_forward
        match trained:
            case "adapter":
                return 2 * 4 * d + 2 * (2 * a + 2 * k + 3 * f) + 4 * (5 * d + a + f)
            case "bfloat16":
                return 2 * 8 * d + 2 * (2 * a + 2 * k + 4 * f)
            case "float32":
                return 2 * 12 * d + 4 * (2 * a + 2 * k + 4 * f)


SHAPES = (
    Shape(name="1B", layers=16, width=2048, heads=32, kv_heads=8, head_width=64, feed_forward=8192, tied=True),
    Shape(name="8B", layers=32, width=4096, heads=32, kv_heads=8, head_width=128, feed_forward=14336, tied=False),
    Shape(name="70B", layers=80, width=8192, heads=64, kv_heads=8, head_width=128, feed_forward=28672, tied=False),
)
SIZES = (10_000, 1_000_000, 100_000_000)
STAGES = ("collect", "fit", "improve", "improve all", "evaluate")


def forward_flop(shape: Shape, assumed: Assumptions, *, tokens: float, predicted: float) -> float:
    """2 FLOP a parameter and token, and attention: 4 · layers · attention width · mean context, half a conversation."""
    attention = 4 * shape.layers * shape.attention_width * assumed.conversation_tokens / 2
    return tokens * (2 * shape.layers * shape.layer_matrices + attention) + 2 * predicted * shape.output_matrix


def training_flop(
    shape: Shape, assumed: Assumptions, *, tokens: float, predicted: float, lora: bool, checkpointing: bool
) -> float:
    """3 forward passes' worth (6 FLOP a parameter and token); 2 where frozen weights need no gradient; 1 more to recompute."""
    passes = (2 if lora else 3) + int(checkpointing)
    return passes * forward_flop(shape, assumed, tokens=tokens, predicted=predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of an improvement step on the GPUs that hold it.

    Example:
        Memory(weights=16e9, policy=.7e9, anchor=.2e9, token_value=.2e9, q_function=.2e9, activations=1.8e9, logits=3e9)
    """

    weights: float
    """Of what all roles share; 0 where each has its own."""
    policy: float
    anchor: float
    token_value: float
    q_function: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who keeps what.

    Example:
        Layout(name="native, LoRA, bfloat16", memory=Memory(...), kept=38.7e9)
    """

    name: str
    memory: Memory
    kept: float
    """Activations where none are computed again."""


def layouts(shape: Shape, assumed: Assumptions) -> list[Layout]:
    """Native with adapters; native with `policy.lora_rank = 0`; a stack with mixed precision and a trained critic.

    A trained float32 parameter takes 16 bytes with its gradient and Adam's two moments, one in bfloat16 with a float32 copy too.
    """
    adapter, parameters = shape.adapter_parameters(assumed.lora_rank), shape.parameters

    def layout(
        name: str, trained: Trained, *, weights: float, policy: float, frozen: float, token_value: float
    ) -> Layout:
        memory = Memory(
            weights=weights,
            policy=policy,
            anchor=frozen,
            token_value=token_value,
            q_function=frozen,
            activations=activation_bytes(shape, assumed, trained, checkpointing=True),
            logits=logit_bytes(shape, assumed),
        )
        return Layout(name=name, memory=memory, kept=activation_bytes(shape, assumed, trained, checkpointing=False))

    return [
        layout(
            "native, LoRA, bfloat16",
            "adapter",
            weights=2 * parameters,
            policy=16 * adapter,
            frozen=4 * adapter,
            token_value=4 * adapter,
        ),
        layout(
            "native, whole, float32",
            "float32",
            weights=0.0,
            policy=16 * parameters,
            frozen=4 * parameters,
            token_value=4 * parameters,
        ),
        layout(
            "mixed precision, critic",
            "bfloat16",
            weights=0.0,
            policy=16 * parameters,
            frozen=2 * parameters,
            token_value=16 * parameters,
        ),
    ]


def activation_bytes(shape: Shape, assumed: Assumptions, trained: Trained, *, checkpointing: bool) -> float:
    """Of one gradient pass: every layer's, or what goes into each and one layer's."""
    layer = shape.layer_activation_bytes(trained)
    into_layer = (4 if trained == "float32" else 2) * shape.width
    kept = shape.layers * into_layer + layer if checkpointing else shape.layers * layer
    return kept * assumed.tokens_per_batch


def logit_bytes(shape: Shape, assumed: Assumptions) -> float:
    """Logits, their softmax and their gradient in float32, at the response tokens of one gradient pass."""
    predicted = assumed.tokens_per_batch * assumed.answered_tokens / assumed.tree_tokens
    return 3 * 4 * predicted * shape.vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What decodes together.

    Example:
        Replica(gpus=1, conversations=426, seconds_per_token=6.1e-05)
    """

    gpus: int
    """The fewest, a power of two, of whose memory the weights take half at most."""
    conversations: int
    """As many as their keys and values leave room for in nine tenths of the memory; `lockstep` at most."""
    seconds_per_token: float
    """GPU-seconds to decode one token of one conversation."""


def replica(shape: Shape, assumed: Assumptions) -> Replica:
    """A step reads the weights and all keys and values once: by bandwidth, or by arithmetic where that takes longer."""
    weights = 2 * shape.parameters
    memory = assumed.gpu_gigabytes * 1e9
    gpus = 1
    while weights > 0.5 * gpus * memory:
        gpus *= 2
    room = 0.9 * gpus * memory - weights
    conversations = min(assumed.lockstep, int(room / (shape.kv_bytes * assumed.conversation_tokens)))
    read = weights + conversations * shape.kv_bytes * assumed.conversation_tokens / 2
    bandwidth = gpus * assumed.bandwidth_terabytes * 1e12 * assumed.bandwidth_share
    flop = conversations * forward_flop(shape, assumed, tokens=1, predicted=1)
    seconds = max(read / bandwidth, flop / (gpus * assumed.flop_per_second))
    return Replica(gpus=gpus, conversations=conversations, seconds_per_token=gpus * seconds / conversations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of an iteration.

    Example:
        Stage(flop=1.4e17, gpu_hours=0.19)
    """

    flop: float
    gpu_hours: float


def collect_stage(shape: Shape, assumed: Assumptions, num_conversations: float) -> Stage:
    """Every token is encoded once; the policy's own come one at a time."""
    sampled = assumed.sampled_tokens
    encoded = forward_flop(shape, assumed, tokens=assumed.conversation_tokens - sampled, predicted=0)
    seconds = encoded / assumed.flop_per_second + sampled * replica(shape, assumed).seconds_per_token
    flop = encoded + forward_flop(shape, assumed, tokens=sampled, predicted=sampled)
    return Stage(flop=num_conversations * flop, gpu_hours=num_conversations * seconds / 3600)


def fit_stage(shape: Shape, assumed: Assumptions, num_conversations: float) -> Stage:
    """Passes over all conversations, a conversation in one row, through an adapter, activations computed again."""
    tokens = num_conversations * assumed.fit_passes * assumed.conversation_tokens
    flop = training_flop(shape, assumed, tokens=tokens, predicted=0, lora=True, checkpointing=True)
    return Stage(flop=flop, gpu_hours=flop / assumed.flop_per_second / 3600)


def improve_stage(shape: Shape, assumed: Assumptions, num_conversations: float) -> Stage:
    """All prompts of some conversations answered once, what they share computed once.

    Sampling; log-probabilities under the anchor and twice under the policy, which bfloat16 needs; reward; token value; and the
    gradient passes.
    """
    tokens, answered = assumed.tree_tokens, assumed.answered_tokens
    encoded = forward_flop(shape, assumed, tokens=assumed.conversation_tokens, predicted=0)
    decoded = forward_flop(shape, assumed, tokens=answered, predicted=answered)
    scored = 3 * forward_flop(shape, assumed, tokens=tokens, predicted=answered)
    valued = 2 * forward_flop(shape, assumed, tokens=tokens, predicted=0)
    trained = assumed.num_passes * training_flop(
        shape, assumed, tokens=tokens, predicted=answered, lora=True, checkpointing=True
    )
    at_once = encoded + scored + valued + trained
    seconds = at_once / assumed.flop_per_second + answered * replica(shape, assumed).seconds_per_token
    return Stage(flop=num_conversations * (at_once + decoded), gpu_hours=num_conversations * seconds / 3600)


def stages(shape: Shape, assumed: Assumptions, num_conversations: int) -> dict[str, Stage]:
    """The stages of an iteration as configured; `improve all`, which is none, answers every logged prompt once."""
    answered = min(num_conversations, assumed.num_updates * assumed.prompts_per_update / assumed.turns)
    return {
        "collect": collect_stage(shape, assumed, num_conversations),
        "fit": fit_stage(shape, assumed, num_conversations),
        "improve": improve_stage(shape, assumed, answered),
        "improve all": improve_stage(shape, assumed, num_conversations),
        "evaluate": collect_stage(shape, assumed, 2 * assumed.evaluation_conversations),
    }


def log_bytes(assumed: Assumptions, num_conversations: int) -> float:
    """Of the log of a collection."""
    messages = 1 + 2 * assumed.turns
    conversation = assumed.bytes_per_token * assumed.conversation_tokens + assumed.bytes_per_message * messages
    return num_conversations * conversation


def figure(x: float) -> str:
    """Two significant digits and no exponent."""
    if x >= 10:
        return f"{float(f'{x:.2g}' if x < 100 else f'{x:.3g}'):,.0f}"
    return f"{float(f'{x:.2g}'):.10f}".rstrip("0").rstrip(".")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def model_table(assumed: Assumptions) -> str:
    """What one conversation costs each model."""
    head = [
        "policy", "parameters, 10^9", "weights, GB", "of an adapter, 10^6", "TFLOP a conversation read",
        "keys and values, MB a conversation", "decodes on", "together", "GPU-ms a sampled token",
    ]  # fmt: skip
    rows = []
    for shape in SHAPES:
        decoding = replica(shape, assumed)
        flop = forward_flop(shape, assumed, tokens=assumed.conversation_tokens, predicted=0)
        rows.append(
            [
                shape.name,
                f"{shape.parameters / 1e9:.2f}",
                figure(2 * shape.parameters / 1e9),
                figure(shape.adapter_parameters(assumed.lora_rank) / 1e6),
                figure(flop / 1e12),
                figure(shape.kv_bytes * assumed.conversation_tokens / 1e6),
                f"{decoding.gpus} GPU" + "s" * (decoding.gpus > 1),
                f"{decoding.conversations}",
                figure(1000 * decoding.seconds_per_token),
            ]
        )
    return table(head, rows)


def memory_table(assumed: Assumptions) -> str:
    """An improvement step's memory by role, GB."""
    head = [
        "policy", "layout", "shared weights", "policy", "anchor", "token value", "Q", "activations", "(not recomputed)",
        "logits", "sum, GB", "GPUs",
    ]  # fmt: skip
    rows = []
    for shape in SHAPES:
        for layout in layouts(shape, assumed):
            memory = layout.memory
            parts = [memory.weights, memory.policy, memory.anchor, memory.token_value, memory.q_function]
            parts += [memory.activations, layout.kept, memory.logits, memory.total]
            gpus = -(-memory.total // (0.9 * assumed.gpu_gigabytes * 1e9))
            rows.append([shape.name, layout.name, *(figure(part / 1e9) for part in parts), f"{gpus:.0f}"])
    return table(head, rows)


def stage_rows(assumed: Assumptions) -> list[dict[str, float | str]]:
    """The figures of the last table."""
    rows: list[dict[str, float | str]] = []
    for shape in SHAPES:
        for size in SIZES:
            costs = stages(shape, assumed, size)
            real = {name: stage for name, stage in costs.items() if name != "improve all"}
            total = sum(stage.gpu_hours for stage in real.values())
            rows.append(
                {
                    "policy": shape.name,
                    "conversations": size,
                    "log_bytes": log_bytes(assumed, size),
                    "host_bytes": size * assumed.conversation_tokens * assumed.host_bytes_per_token,
                    **{f"{name} flop": stage.flop for name, stage in costs.items()},
                    **{name: stage.gpu_hours for name, stage in costs.items()},
                    "hours": total / assumed.gpus,
                    "bottleneck": max(real, key=lambda name: real[name].gpu_hours),
                }
            )
    return rows


def flop_table(rows: Sequence[dict[str, float | str]]) -> str:
    """Floating-point operations of the stages."""
    head = ["policy", "conversations", *(f"{name}, PFLOP" for name in STAGES)]
    return table(head, [[*_tier(row), *(figure(float(row[f"{name} flop"]) / 1e15) for name in STAGES)] for row in rows])


def hours_table(rows: Sequence[dict[str, float | str]], assumed: Assumptions) -> str:
    """GPU-hours of the stages, bytes, and which stage takes longest."""
    head = [
        "policy", "conversations", "log, GB", "in memory, GB", *STAGES, f"hours on {assumed.gpus} GPUs", "longest",
    ]  # fmt: skip
    return table(
        head,
        [
            [
                *_tier(row),
                figure(float(row["log_bytes"]) / 1e9),
                figure(float(row["host_bytes"]) / 1e9),
                *(figure(float(row[name])) for name in STAGES),
                figure(float(row["hours"])),
                str(row["bottleneck"]),
            ]
            for row in rows
        ],
    )


def _tier(row: dict[str, float | str]) -> list[str]:
    return [str(row["policy"]), f"10^{len(str(row['conversations'])) - 1}"]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    assumed = Assumptions(**vars(parser.parse_args()))
    rows = stage_rows(assumed)
    print(model_table(assumed), memory_table(assumed), flop_table(rows), hours_table(rows, assumed), sep="\n\n")
    print(json.dumps({"assumptions": dataclasses.asdict(assumed), "rows": rows}))


if __name__ == "__main__":
    main()
