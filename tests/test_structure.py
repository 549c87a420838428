"""Source structure: allowed imports, and the sizes of files and functions."""

import ast

import pytest
from conftest import ROOT

SEVEN = ("main", "config", "dataset", "modules", "clip", "gan", "inference")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("extras/*.py")])
    if path.name != "__init__.py"
}
UTILS = {name for name in FILES if name.startswith("utils.")}
EXTRAS = {name for name in FILES if name.startswith("extras.")}
SEARCH = {"inference", "extras.search_index", "extras.match_threshold", "extras.zero_shot"}
TRAINING_EXTRAS = {
    "extras.check_data",
    "extras.gan_stages",
    "extras.joint_gan",
    "extras.projected_gan",
    "extras.stylegan",
}
# Every project module that a file may import; the seven may import extras only inside functions.
ALLOWED = {
    "config": {"utils.flags"},
    "dataset": {"config", *UTILS},
    "modules": {"config", *UTILS},
    "clip": {"config", "modules", *UTILS},
    "gan": {"config", "dataset", "modules", "clip", *TRAINING_EXTRAS, *UTILS},
    "main": {"config", "dataset", "modules", "clip", "gan", *TRAINING_EXTRAS, *UTILS},
    "inference": {"config", "dataset", "modules", "clip", *UTILS, *EXTRAS},
    **{name: {"config", *UTILS} for name in UTILS},
    **{name: {*FILES} - {"main"} for name in EXTRAS},
}
LIGHT = ("config", "utils.cli", "utils.files", "utils.flags", "utils.gan_settings", "utils.hashing", "utils.runs")
HEAVY = {
    "torch",
    "numpy",
    "pandas",
    "timm",
    "transformers",
    "albumentations",
    "cv2",
    "matplotlib",
    "PIL",
    "safetensors",
}


def read(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imported_modules(node):
    """The modules that an import statement names; `from utils import files` counts as utils.files."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        submodules = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name for name in submodules if name in FILES} or {node.module}
    return set()


def imports(name, lazy):
    """The modules that a file imports: at its top level, or with `lazy` inside functions."""
    tree = read(name)
    inside = {
        child
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda, ast.AsyncFunctionDef))
        for child in ast.walk(function)
    }
    nodes = [node for node in ast.walk(tree) if (node in inside) == lazy]
    return set().union(*map(imported_modules, nodes))


def project_imports(name, lazy):
    return imports(name, lazy) & set(FILES)


# ---- imports ----------------------------------------------------------------------------------------------------


def test_seven_modules_and_two_packages_hold_the_source():
    assert {name for name in FILES if "." not in name} == set(SEVEN)
    for package in ("utils", "extras"):
        assert (ROOT / package / "__init__.py").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("name", FILES)
def test_file_imports_only_what_its_layer_allows(name):
    found = project_imports(name, lazy=False) | project_imports(name, lazy=True)
    assert found <= ALLOWED[name], sorted(found - ALLOWED[name])


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_import_extras_only_inside_functions(name):
    assert not project_imports(name, lazy=False) & EXTRAS


def test_config_imports_project_modules_only_inside_functions():
    assert project_imports("config", lazy=False) == set()


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name):
    packages = {module.split(".")[0] for module in imports(name, lazy=False) | imports(name, lazy=True)}
    assert not packages & HEAVY


def test_training_and_gan_import_nothing_of_search():
    """Neither directly (lazy imports included) nor through their top-level imports."""
    reached, left = set(), {"main", "gan"}
    while left:
        name = left.pop()
        reached.add(name)
        own = project_imports(name, lazy=False)
        if name in ("main", "gan"):
            own |= project_imports(name, lazy=True)
        left |= own - reached
    assert not reached & SEARCH
    assert {"dataset", "clip", "extras.joint_gan"} <= reached


# ---- sizes ------------------------------------------------------------------------------------------------------


def num_lines(name):
    return len(FILES[name].read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", ["main", "clip", "modules", "gan", "inference"])
def test_main_files_have_at_most_450_lines(name):
    assert num_lines(name) <= 450


def test_the_seven_have_at_most_2600_lines():
    sizes = {name: num_lines(name) for name in SEVEN}
    assert sum(sizes.values()) <= 2600, (sum(sizes.values()), sizes)


@pytest.mark.parametrize(("optional", "most"), [(False, 7500), (True, 1900)])
def test_source_is_limited_in_size(optional, most):
    sizes = {name: num_lines(name) for name in FILES if name.startswith("extras") == optional}
    assert sum(sizes.values()) <= most, (sum(sizes.values()), sizes)


@pytest.mark.parametrize("name", FILES)
def test_functions_have_at_most_60_lines(name):
    for node in ast.walk(read(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60, f"{node.name} has {size} lines"


def test_readme_tables_are_complete():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    header = None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.startswith("|---"):
            header = line.count("|")
        elif line.startswith("|") and not line.startswith("|---"):
            assert line.count("|") == header, line
        assert "_ROW" not in line and "_TIME" not in line
