"""Rules of the house that no linter says, kept by reading the source; nothing is imported.

The direction of imports, code free of tensors, prints, peft and docstrings are rules of
import-linter and ruff in pyproject.toml, run by `make lint`. Each rule here is a function from
modules to complaints, and each has a test that shows it can fail.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
NAMES = ("lora_runtime", "loramux")
"""All that an installation puts beside other people's packages."""
FOLDERS = {"lora_runtime": "lora_runtime", "loramux": "loramux", "loramux.server": "server"}
"""Package → its folder, with which its modules' names begin."""

MAX_FUNCTION_LINES = 50
MAX_KERNEL_BODY_LINES = 150

SERVICE, COMMAND_LINE = "loramux.server", "loramux.server.cli"
CLIENT = "loramux.server.client"
SHARED_WITH_CLIENTS = {"loramux.server.errors", "lora_runtime.errors", "lora_runtime.plain_file",
                       "lora_runtime.adapters.files.file_names",
                       "lora_runtime.adapters.files.open_folder", "loramux.v1"}  # fmt: skip
"""All that the client imports of ours: nothing of the service side."""

GRPC_DOORS = [
    "loramux.server.access.grpc_gate", "loramux.server.access.tls", "loramux.server.rpc.*",
    "loramux.server.errors", "loramux.server.client", "loramux.server.client.channel",
    "loramux.server.grpc_handlers", "loramux.server.observability.grpc_calls",
]  # fmt: skip
DOORS = {
    "accelerate": ["lora_runtime.base.streamed_load"],
    "bitsandbytes": ["lora_runtime.base.model.quant_linear", "lora_runtime.training.*"],
    "cuda": ["lora_runtime.kernels.cuda.product"],
    "gcsfs": ["loramux.server.adapters.sources.buckets"],
    "gguf": ["lora_runtime.base.gguf"],
    "google.rpc": ["loramux.server.errors"],
    "grpc": GRPC_DOORS,
    "grpc_health": GRPC_DOORS,
    "grpc_reflection": GRPC_DOORS,
    "grpc_status": GRPC_DOORS,
    "huggingface_hub": ["lora_runtime.base.catalog", "loramux.server.adapters.sources.hub"],
    "jinja2": ["lora_runtime.text.template_check"],
    "llguidance": ["lora_runtime.text.structured_output", "lora_runtime.text.structure_compiler"],
    "opentelemetry": ["loramux.server.observability.tracing"],
    "loramux.v1": ["loramux.server.*"],
    "matplotlib": ["lora_runtime.training.report.files"],
    "prometheus_client": ["loramux.server.observability.metrics"],
    "pyarrow": ["lora_runtime.training.rows"],
    "pydantic": ["lora_runtime.settings", "lora_runtime.config", "lora_runtime.training.config",
                 "loramux.server.access.keys", "loramux.server.config",
                 "loramux.server.cli.settings", "loramux.server.openai.schema"],
    "regex": ["lora_runtime.adapters.config.matching"],
    "rich": ["lora_runtime.terminal", "lora_runtime.training.report.progress",
             "lora_runtime.training.trainer", "loramux.server.cli", "loramux.server.cli.*"],
    "s3fs": ["loramux.server.adapters.sources.buckets"],
    "safetensors": ["lora_runtime.adapters.files.folder", "lora_runtime.base.*",
                    "lora_runtime.training.checkpoint"],
    "starlette": ["loramux.server.http_gateway", "loramux.server.openai.*",
                  "loramux.server.page.routes"],
    "structlog": ["loramux.server.*"],
    "tokenizers": ["lora_runtime.base.*", "lora_runtime.text.*"],
    "transformers": ["lora_runtime.base.*", "lora_runtime.text.*",
                     "lora_runtime.training.*"],
    "triton": ["lora_runtime.kernels.*"],
    "typer": ["loramux.server.cli", "loramux.server.cli.*"],
    "uvicorn": ["loramux.server.http_connection", "loramux.server.http_server"],
    "yaml": ["loramux.server.cli.keys", "loramux.server.cli.serve", "lora_runtime.settings"],
}  # fmt: skip
"""Third-party package, or our wire's → the only modules that may import it."""
EVERYWHERE = {"torch", "numpy"}
"""Third-party packages without a door."""

DISTRIBUTIONS = {
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "huggingface_hub": "huggingface-hub",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
"""Import name → distribution, where they differ."""

ESTABLISHED_NAMES = {"lora_runtime.engine.block_manager"}
BANNED_WORDS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
OUTSIDE = ".." + "/shared"


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def is_kernel(self) -> bool:
        """Kernel bodies (Triton here, C++ elsewhere) are counted apart."""
        return self.name.startswith("lora_runtime.kernels.") and "triton" in self.imports

    @cached_property
    def imports(self) -> set[str]:
        """Every module named by an import, inside functions and TYPE_CHECKING too."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        return found

    @cached_property
    def functions(self) -> list[tuple[str, int]]:
        """(name, lines without its docstring) of every function and method."""
        return [
            (f"{self.name}.{node.name}", _function_lines(node))
            for node in ast.walk(self.tree)
            if isinstance(node, FUNCTIONS)
        ]


def _function_lines(node: FUNCTIONS) -> int:
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def read_modules() -> list[Module]:
    modules = []
    for package, folder in FOLDERS.items():
        for path in sorted((REPO / folder).rglob("*.py")):  # which follows no links
            parts = path.relative_to(REPO / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            modules.append(Module(name, path.read_text(encoding="utf-8")))
    return modules


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules()


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def service_in_client(modules: Iterable[Module]) -> Iterator[str]:
    """And the service imports nothing of the client."""
    own = {module.name for module in modules}
    for module in modules:
        is_client = is_within(module.name, CLIENT)
        is_service = is_within(module.name, SERVICE) and not is_within(module.name, COMMAND_LINE)
        for imported in sorted(module.imports):
            if is_client and imported.partition(".")[0] in NAMES:
                allowed = (*SHARED_WITH_CLIENTS, CLIENT)
                is_package = any(name.startswith(f"{imported}.") for name in own)
                if not is_package and not any(is_within(imported, name) for name in allowed):
                    yield f"{module.name} imports {imported}, which is not for clients"
            if is_service and not is_client and is_within(imported, CLIENT):
                yield f"{module.name} imports {imported}, which is for clients"


def wrong_door(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        for imported in sorted(module.imports):
            for package, doors in DOORS.items():
                if is_within(imported, package) and not any(opens(d, module.name) for d in doors):
                    yield f"{module.name} imports {imported}; its doors are {', '.join(doors)}"


def opens(door: str, name: str) -> bool:
    return name.startswith(door[:-1]) if door.endswith("*") else name == door


def third_party(modules: Iterable[Module]) -> set[str]:
    found = {imported.partition(".")[0] for module in modules for imported in module.imports}
    return found - set(sys.stdlib_module_names) - set(NAMES)


def without_door(modules: Iterable[Module]) -> set[str]:
    known = {package.partition(".")[0] for package in DOORS} | EVERYWHERE
    return third_party(modules) - known


def undocumented(modules: list[Module]) -> Iterator[str]:
    """Public methods; ruff asks the rest. A property's name says it, and a method may be explained
    by the class it is inherited from, a constructor by its class, an RPC by its proto."""
    owners = [
        (module.name, owner)
        for module in modules
        for owner in ast.walk(module.tree)
        if isinstance(owner, ast.ClassDef)
    ]
    explained = {
        node.name for _, owner in owners for node in _methods(owner) if ast.get_docstring(node)
    }
    for name, owner in owners:
        for method in _methods(owner):
            is_private = method.name.startswith("_") or owner.name.startswith("_")
            is_rpc = method.name[0].isupper()
            decorators = {_last_name(decorator) for decorator in method.decorator_list}
            is_plain = not any(d == "classmethod" or d.endswith("property") for d in decorators)
            if is_plain and not (is_private or is_rpc or method.name in explained):
                yield f"{name}.{owner.name}.{method.name} has no docstring"


def _methods(owner: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in owner.body if isinstance(node, FUNCTIONS)]


def _last_name(node: ast.expr) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")


def oversized(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        limit = MAX_KERNEL_BODY_LINES if module.is_kernel else MAX_FUNCTION_LINES
        for name, num_lines in module.functions:
            if num_lines > limit:
                yield f"{name} has {num_lines} lines, over {limit}"


def badly_named(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        banned = BANNED_WORDS & set(re.split(r"[._]", module.name))
        if banned and module.name not in ESTABLISHED_NAMES:
            yield f"{module.name} is called {', '.join(banned)}"


def undeclared(modules: Iterable[Module], pyproject: dict) -> set[str]:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    optional = [entry for name in extras.keys() - {"test", "bench"} for entry in extras[name]]
    declared = {
        re.split(r"[^A-Za-z0-9-]", requirement)[0].lower()
        for requirement in [*project["dependencies"], *optional]
    }
    return {name for name in third_party(modules) if DISTRIBUTIONS.get(name, name) not in declared}


def text_files() -> Iterator[Path]:
    """What is kept in git, as far as a file's place shows it."""
    skipped = re.compile(
        r"\.(git|venv|\w+_cache|hypothesis)|build|dist|demo-output|__pycache__|.*egg-info"
    )
    suffixes = {
        ".py",
        ".pyi",
        ".md",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
        ".proto",
        ".cpp",
        ".json",
        "",
    }
    waiting = [REPO]
    while waiting:
        for path in waiting.pop().iterdir():
            if skipped.fullmatch(path.name):
                continue
            if path.is_dir():
                waiting.append(path)
            elif path.suffix in suffixes:
                yield path


def complaints(found: Iterable[str]) -> str:
    return "\n".join(sorted(found))


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def test_client_and_service_know_nothing_of_each_other(modules):
    assert complaints(service_in_client(modules)) == ""


def test_every_third_party_package_has_its_door(modules):
    assert complaints(wrong_door(modules)) == ""
    assert without_door(modules) == set(), "give it a door in DOORS"


def test_what_is_imported_is_declared(modules, pyproject):
    assert undeclared(modules, pyproject) == set()


def test_public_methods_are_documented(modules):
    assert complaints(undocumented(modules)) == ""


def test_names_say_something(modules):
    assert complaints(badly_named(modules)) == ""


def test_functions_are_short(modules):
    assert complaints(oversized(modules)) == ""


def test_nothing_refers_to_files_outside_the_repository():
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        assert OUTSIDE not in text, path.relative_to(REPO)


BAD_SOURCES = {
    wrong_door: [
        ("loramux.server.service", "import grpc.aio"),
        ("loramux.server.adapters.registry", "from google.rpc import status_pb2"),
        ("lora_runtime.core", "import structlog"),
        ("lora_runtime.engine.engine", "from transformers import AutoConfig"),
        ("loramux.server.app", "from prometheus_client import Counter"),
        ("lora_runtime.base.loader", "import triton.language as tl"),
    ],
    service_in_client: [
        ("loramux.server.client.uploads", "from loramux.server.adapters.uploads import Upload"),
        ("loramux.server.client", "from lora_runtime.engine import loop"),
        ("loramux.server.rpc.server", "from loramux.server.client.channel import Stubs"),
    ],
    without_door: [("loramux.server.service", "import requests")],
    undocumented: [
        ("loramux.server.app", "class A:\n    def run(self): pass"),
        ("loramux.server.app", "class A:\n    @cache\n    async def run(self): pass"),
    ],
    oversized: [
        ("loramux.server.app", "def f():\n" + "    x = 1\n" * 50),
        ("lora_runtime.kernels.lora", "import triton\ndef f():\n" + "    x = 1\n" * 150),
    ],
    badly_named: [("loramux.server.text_utils", ""), ("lora_runtime.common.text", "")],
}


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [(rule, *bad) for rule, sources in BAD_SOURCES.items() for bad in sources],
)
def test_each_rule_can_fail(rule, name, source):
    assert list(rule([Module(name, source)])) != []


def test_documentation_does_not_count_as_length():
    long = 'def f():\n    """' + "words\n" * 60 + '"""\n    return 1\n'
    module = Module("loramux.server.app", "# why\n\n" + long)
    assert module.functions == [("loramux.server.app.f", 2)]
