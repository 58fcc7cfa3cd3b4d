"""The paper's reduction is an import rule: what improves a policy cannot know that conversations have turns."""

import ast
import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import iterative_ppo

PACKAGE = Path(iterative_ppo.__file__).parent

LAYERS: list[dict[str, str]] = [
    {  # 0: concepts
        "config": "",
        "entry_points": "",
        "extras": "",
        "memory": "",
        "q_folder": "config",
        "conversations": "",
        "conversation_checks": "conversations",
        "conversation_log": "conversation_checks conversations",
        "log_summary": "conversation_checks conversation_log conversations",
        "returns": "",
        "losses": "",
        "distributed": "",
        "batching": "distributed",
        "intervals": "",
    },
    {  # 1: models
        "activation_checkpointing": "",
        "sharding": "distributed",
        "adapters": "sharding",
        "compatibility": "",
        "rendering": "",
        "last_layer": "",
        "sampling": "last_layer losses rendering sharding",
        "muon": "",
        "supervised": "batching distributed muon sharding",
        "shared_prefix": "batching",
        "sampling_chunks": "distributed rendering sampling shared_prefix",
        "conversation_features": "shared_prefix",
        "policy": "activation_checkpointing adapters batching config distributed last_layer losses rendering sampling sampling_chunks shared_prefix sharding supervised",
        "q_function": "activation_checkpointing adapters batching conversation_features distributed last_layer losses shared_prefix sharding supervised",
        "frozen_features": "adapters q_function supervised",
        "labelled_sequence": "batching q_function",
        "word_tasks": "labelled_sequence q_function",
        "q_fit": "batching config distributed frozen_features labelled_sequence losses q_function sharding supervised word_tasks",
        "read_out_regression": "losses supervised",
        "read_out": "config conversation_features distributed frozen_features labelled_sequence q_fit q_function read_out_regression supervised",
        "q_report": "intervals q_fit",
        "text_baseline": "conversations",
    },
    {  # 2: one half of an iteration each
        "improvement": "adapters batching config distributed extras losses policy rendering shared_prefix sharding supervised",
        "environments": "conversations distributed entry_points policy sharding supervised",
    },
    {  # 3: turns meet tokens; may import all of the layers below, and of this one what is named
        "turns_to_tokens": "",
        "run_directory": "",
        "pretraining": "",
        "loading": "",
        "q_from_logs": "loading run_directory turns_to_tokens",
        "q_reward": "",
        "from_logs": "loading pretraining q_from_logs q_reward run_directory turns_to_tokens",
        "stages": "from_logs loading q_from_logs run_directory",
        "policy_iteration": "run_directory stages",
        "cross_validation": "q_from_logs turns_to_tokens",
        "step": "cross_validation from_logs loading q_from_logs run_directory turns_to_tokens",
        "open_step": "run_directory step",
        "export": "loading open_step run_directory turns_to_tokens",
        "import_candidate": "export loading open_step q_reward run_directory turns_to_tokens",
        "ranking": "",
        "conformance": "",
        "conformance_http": "conformance",
        "report": "conformance policy_iteration ranking",
        "tables": "",
        "log_scores": "loading turns_to_tokens",
        "with_ray": "loading log_scores",
        "dynamic_batching": "",
        "http_guard": "",
        "q_scoring": "loading",
        "q_requests": "q_scoring",
        "q_metrics": "q_scoring",
        "q_server": "dynamic_batching http_guard q_metrics q_requests q_scoring",
        "serve": "run_directory turns_to_tokens",
    },
    {  # 4: the command line; likewise
        "commands": "",
        "command_line": "commands",
        "__main__": "command_line",
    },
]
"""Every unit, a line each, with the units that it may import directly. A unit is a module or a package."""

TURNS = {"conversations", "conversation_checks", "conversation_log", "log_summary", "returns", "text_baseline"}
Q = {
    "q_function",
    "frozen_features",
    "labelled_sequence",
    "word_tasks",
    "q_fit",
    "read_out",
    "read_out_regression",
    "q_report",
}
NEVER = {
    "improvement": TURNS | Q | {"environments"},
    "environments": Q | {"improvement", "returns"},
    "policy": TURNS | Q | {"improvement", "environments"},
    "rendering": TURNS | Q | {"improvement", "environments"},
    "sampling": TURNS | Q | {"improvement", "environments"},
    "sampling_chunks": TURNS | Q | {"improvement", "environments", "policy"},
    "supervised": TURNS | Q | {"improvement", "environments"},
    "last_layer": TURNS | Q | {"improvement", "environments", "policy"},
    "shared_prefix": TURNS | Q | {"improvement", "environments"},
    "q_function": TURNS | {"improvement", "environments", "policy"},
    "q_fit": TURNS | {"improvement", "environments", "policy"},
    "read_out": TURNS | {"improvement", "environments", "policy"},
    "q_report": TURNS | {"improvement", "environments", "policy"},
    "report": {"serve"},
    "serve": {"report"},
}
"""What a unit may not reach by any road, whatever the units on it may import."""

LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}
Graph = Mapping[str, set[str]]
"""For each module, the modules of the package that it imports."""


def imported_modules(source: str, known: set[str]) -> Iterator[str]:
    """Modules of the package that a source text imports: anywhere in it, inside functions too.

    Importing `iterative_ppo.a.b` runs `iterative_ppo.a` as well.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the module's whole name"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from known.intersection(".".join(parts[:end]) for end in range(1, len(parts) + 1))


def unit_of(module: str) -> str:
    return module.split(".")[1]


@cache
def import_graph() -> Graph:
    sources = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    root = sources.pop("iterative_ppo")
    assert not set(imported_modules(root, set(sources))), "the package itself imports nothing"
    return {module: set(imported_modules(source, set(sources))) - {module} for module, source in sources.items()}


def unit_graph(graph: Graph) -> Graph:
    """The same between units."""
    units: dict[str, set[str]] = {unit_of(module): set() for module in graph}
    for module, imported in graph.items():
        units[unit_of(module)] |= {unit_of(other) for other in imported} - {unit_of(module)}
    return units


def reachable(graph: Graph, start: str) -> dict[str, list[str]]:
    """Every module that `start` imports directly or through others, with the road that leads there."""
    roads: dict[str, list[str]] = {}
    queue = [[start]]
    while queue:
        road = queue.pop(0)
        for module in sorted(graph[road[-1]] - roads.keys() - {start}):
            roads[module] = [*road, module]
            queue.append(roads[module])
    return roads


def direct_violations(graph: Graph) -> Iterator[str]:
    for unit, imported in unit_graph(graph).items():
        layer = LAYER_OF[unit]
        allowed = set(LAYERS[layer][unit].split())
        if layer >= 3:
            allowed |= {other for other, other_layer in LAYER_OF.items() if other_layer < layer}
        for other in sorted(imported - allowed):
            yield f"{unit} imports {other}"


def transitive_violations(graph: Graph) -> Iterator[str]:
    for module in graph:
        never = NEVER.get(unit_of(module), set())
        for other, road in reachable(graph, module).items():
            if unit_of(other) in never or LAYER_OF[unit_of(other)] > LAYER_OF[unit_of(module)]:
                yield " -> ".join(road)


# --- the rule -----------------------------------------------------------------------------------------------


def test_every_module_is_in_the_table():
    unknown = {unit_of(module) for module in import_graph()} - LAYER_OF.keys()
    assert not unknown, f"give {', '.join(sorted(unknown))} a line in LAYERS: its layer and what it may import"


def test_units_import_only_what_the_table_allows():
    assert list(direct_violations(import_graph())) == []


def test_no_road_leads_from_tokens_to_turns():
    """Directly or through others: `improvement` cannot reach conversations, returns or Q; Q can reach neither
    conversations nor the improvement step; and nothing reaches a layer above its own."""
    assert list(transitive_violations(import_graph())) == []


def test_turns_meet_tokens_in_the_third_layer_alone():
    """Below it, whoever knows a conversation knows no loss, no Q and no improvement step. A simulator's rollout lets a
    policy speak, and asks of it nothing but that."""
    graph = import_graph()
    tokens = Q | {"losses", "batching", "sampling", "rendering", "improvement"}
    for module, imported in graph.items():
        if LAYER_OF[unit_of(module)] < 3:
            reached = set(map(unit_of, imported if unit_of(module) == "environments" else reachable(graph, module)))
            assert not (reached & TURNS and reached & tokens), f"{module}: {sorted(reached)}"


def test_nothing_imports_the_command_line():
    for unit, imported in unit_graph(import_graph()).items():
        assert "__main__" not in imported, unit
        assert LAYER_OF[unit] == 4 or not imported & LAYERS[4].keys(), unit


def test_there_is_no_circle():
    units = unit_graph(import_graph())
    for unit in units:
        assert unit not in itertools.chain.from_iterable(units[other] for other in reachable(units, unit)), unit


@pytest.mark.parametrize(
    "module", ["config", "extras", "conversations", "conversation_log", "log_summary", "returns", "intervals", "tables"]
)
def test_what_needs_no_torch_imports_none(module: str):
    """Directly or through others: reading a log or a configuration must not take seconds."""
    heavy = {"torch", "transformers"}
    own = f"iterative_ppo.{module}"
    for other in [own, *reachable(import_graph(), own)]:
        path = PACKAGE.joinpath(*other.split(".")[1:])
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert not set(imported_modules(source, heavy)), other


# --- and that it can fail -----------------------------------------------------------------------------------


def test_every_way_to_import_is_seen():
    known = {"p.a", "p.b", "p.c", "p.c.d", "p.e"}
    source = """
import p.a
from p import b, nothing
def late():
    from p.c.d import name
if TYPE_CHECKING:
    import p.e as other
import torch
"""
    assert set(imported_modules(source, known)) == {"p.a", "p.b", "p.c", "p.c.d", "p.e"}
    with pytest.raises(AssertionError, match="relative import"):
        list(imported_modules("from . import a", known))


def test_a_road_through_others_is_found():
    """improvement -> policy -> conversations: each step alone might look harmless."""

    def graph(*edges: str) -> dict[str, set[str]]:
        modules: dict[str, set[str]] = {}
        for edge in edges:
            a, b = (f"iterative_ppo.{name}" for name in edge.split(" -> "))
            modules.setdefault(a, set()).add(b)
            modules.setdefault(b, set())
        return modules

    hidden = graph("improvement -> policy", "policy -> conversations")
    assert "iterative_ppo.improvement -> iterative_ppo.policy -> iterative_ppo.conversations" in list(
        transitive_violations(hidden)
    )
    assert list(direct_violations(hidden)) == ["policy imports conversations"]
    assert list(direct_violations(graph("losses -> config"))) == ["losses imports config"]
    assert list(transitive_violations(graph("q_fit -> stages"))) == ["iterative_ppo.q_fit -> iterative_ppo.stages"]
    assert list(direct_violations(graph("from_logs -> improvement", "from_logs -> turns_to_tokens"))) == []
