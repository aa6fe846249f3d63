# SPDX-License-Identifier: Apache-2.0
"""The repository's frame: what stands where, who may import whom, what is packaged, and that the README's commands are run."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent

TOP_LEVEL = {
    "ld3_diffusers",
    "pipelines",
    "training",
    "tests",
    "examples",
    "setup.cfg",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci",
    ".gitignore",
}

# Rooms that a room must not import.
CLOSED_TO = {
    "ld3_diffusers": {"training", "pipelines", "examples", "tests"},
    "pipelines": {"training", "examples", "tests"},
    "training": {"examples", "tests"},
}
# Files that are copied into pipeline folders, and must stand alone there.
FAMILIES = ("edm.py", "adm.py", "ldm.py")

# What the installable library imports beside the standard library; scipy only where it is used, not on import.
LIBRARY_IMPORTS = {"torch", "diffusers", "huggingface_hub"}
LIBRARY_LAZY_IMPORTS = {"scipy"}

# How each bash command of the README begins: the file that runs it and a text that shows so. None is there that nothing runs.
README_COMMANDS = {
    "make demo": ("Makefile", "\ndemo:"),
    "make test": (".ci/run", "\nmake --no-print-directory test\n"),
    ".venv/bin/python -m pipelines.convert": ("tests/test_readme.py", "convert.main("),
    ".venv/bin/accelerate launch -m training.make_teacher_set": (
        "tests/test_readme.py",
        '"training.make_teacher_set"',
    ),
    ".venv/bin/accelerate launch -m training.train_ld3": ("tests/test_readme.py", '"training.train_ld3"'),
    ".venv/bin/accelerate launch -m training.train_amed": ("tests/test_readme.py", '"training.train_amed"'),
    ".venv/bin/accelerate launch -m training.publish": ("tests/test_readme.py", '"training.publish"'),
    ".venv/bin/accelerate launch -m training.search_gits": ("tests/test_readme.py", '"training.search_gits"'),
    ".venv/bin/accelerate launch -m training.search_oss": ("tests/test_readme.py", '"training.search_oss"'),
    ".venv/bin/accelerate launch -m training.sample": ("tests/test_readme.py", '"training.sample"'),
    ".venv/bin/accelerate launch -m training.evaluate": ("tests/test_readme.py", '"training.evaluate"'),
    ".venv/bin/accelerate launch -m training.make_reference": ("tests/test_readme.py", "make_reference.main("),
}


def repository_files():
    """Files that are tracked, or would be by `git add .`, as paths relative to the root."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return sorted(Path(name) for name in listing.split("\0") if name and (ROOT / name).exists())


def imported_packages(source, on_import_only=False):
    """Top-level names of the absolute imports in Python source; `on_import_only` leaves out those inside functions."""
    names, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
        if not (on_import_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def python_files(room):
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def bash_commands(markdown):
    """Commands of the ```bash blocks: continued lines joined, comments and prompts left out."""
    commands = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
            if command:
                commands.append(" ".join(command.split()))
    return commands


def test_top_level():
    assert {path.parts[0] for path in repository_files()} == TOP_LEVEL


def test_every_python_file_names_the_licence():
    files = [path for path in repository_files() if path.suffix == ".py"]
    first_lines = {str(path): (ROOT / path).read_text().partition("\n")[0] for path in files}
    assert first_lines == dict.fromkeys(first_lines, "# SPDX-License-Identifier: Apache-2.0")


def test_imported_packages_sees_what_it_should():
    source = "import a.b as c\nfrom . import d\nfrom .e import f\nclass G:\n    from g.h import i\n    def j(self):\n        import k\n"
    assert imported_packages(source) == {"a", "g", "k"}
    assert imported_packages(source, on_import_only=True) == {"a", "g"}


@pytest.mark.parametrize("room", CLOSED_TO)
def test_rooms_import_one_way(room):
    wrong = {
        str(path.relative_to(ROOT)): imported_packages(path.read_text()) & CLOSED_TO[room]
        for path in python_files(room)
    }
    assert wrong, "no Python files found"
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("file", FAMILIES)
def test_a_family_stands_alone(file):
    source = (ROOT / "pipelines" / file).read_text()
    assert imported_packages(source) <= {"torch", "diffusers"} | sys.stdlib_module_names
    relative = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


def test_what_families_share_they_share_to_the_letter():
    shared: dict[str, set[str]] = {}
    for file in FAMILIES:
        source = (ROOT / "pipelines" / file).read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                shared.setdefault(node.name, set()).add(ast.get_source_segment(source, node))
    assert {"_batch_size", "_integers"} <= shared.keys()
    assert [name for name, texts in shared.items() if len(texts) > 1] == []


def test_library_needs_only_what_it_declares():
    own = LIBRARY_IMPORTS | {"ld3_diffusers"} | sys.stdlib_module_names
    for path in python_files("ld3_diffusers"):
        assert imported_packages(path.read_text(), on_import_only=True) <= own, path
        assert imported_packages(path.read_text()) <= own | LIBRARY_LAZY_IMPORTS, path

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {re.match(r"\w+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}
    assert required == LIBRARY_IMPORTS


def test_library_import_loads_nothing_heavy_beyond_diffusers():
    program = """
import sys
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
before = {name.partition(".")[0] for name in sys.modules}
import ld3_diffusers
print(*sorted({name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert set(result.stdout.split()) <= {"ld3_diffusers", "huggingface_hub"}


def test_wheel_holds_the_library_and_nothing_else(tmp_path):
    tree, wheels = tmp_path / "tree", tmp_path / "wheels"
    wheels.mkdir()
    for path in repository_files():
        if path.suffix == ".py" or len(path.parts) == 1:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, tree / path)
    program = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, "-c", program], cwd=tree, env=environment, stdout=subprocess.PIPE, check=True)

    (wheel,) = wheels.iterdir()
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    modules = {name for name in names if not name.parts[0].endswith(".dist-info")}
    assert modules == {path.relative_to(ROOT) for path in python_files("ld3_diffusers")}
    assert any(name.name == "LICENSE" for name in names)


def test_constraints_pin_every_direct_dependency():
    def normalised(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normalised(line.partition("==")[0]) for line in lines}

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    named = {normalised(re.match(r"[\w.-]+", line)[0]) for text in requirements for line in text.split("\n") if line}
    assert named <= pinned


def test_bash_commands_are_found():
    markdown = "text\n```bash\n# a comment\nmake demo  # another\n$ run \\\n    --this\n```\n```python\nx = 1\n```\n"
    assert bash_commands(markdown) == ["make demo", "run --this"]


def test_readme_commands_are_run():
    commands = bash_commands((ROOT / "README.md").read_text())
    assert {next(filter(command.startswith, README_COMMANDS), command) for command in commands} == set(README_COMMANDS)
    for command, (path, shown_by) in README_COMMANDS.items():
        assert shown_by in (ROOT / path).read_text(), f"{path} does not run {command!r}"
