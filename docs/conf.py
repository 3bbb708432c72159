"""The documentation: python -m sphinx -W -n docs build/docs"""

import importlib
import pkgutil
import re
from pathlib import Path

from docutils.nodes import Element, TextElement
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import temporal_agg

project = "temporal-agg"
version = release = temporal_agg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"temporal-agg {version}"
html_show_copyright = html_show_sourcelink = False
html_copy_source = False
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # torch's own text for forward says nothing
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signatures have the types

# Other projects' objects: nothing is downloaded to link them.
nitpick_ignore_regex = [
    ("py:.*", r"(?!temporal_agg\.)\w+(\.\w+)+"),
    ("py:class", r"(temporal_agg\..*\.)?(Array|Class|Id|State|T)"),  # type variables
]
nitpick_ignore = [("py:class", name) for name in ("Figure", "Image", "Tensor")]
nitpick_ignore += [("py:class", f"temporal_agg.aggregators.registry.{name}") for name in ("Build", "BuildCriterion")]


def resolve(app: Sphinx, env: BuildEnvironment, node: Element, contnode: TextElement) -> Element | None:
    """Links a name of ours by its last part: data.Tracklet is documented as temporal_agg.Tracklet."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or ("." in target and not target.startswith("temporal_agg.")):
        return None
    last = target.rpartition(".")[2]
    objects = env.get_domain("py").objects
    found = [(name, x) for name, x in objects.items() if not x.aliased and name.rpartition(".")[2] == last]
    if len(found) != 1:
        return None
    ((name, x),) = found
    return make_refnode(app.builder, node["refdoc"], x.docname, x.node_id, contnode, name)


def escape(app: Sphinx, what: str, name: str, obj: object, options: dict, lines: list[str]) -> None:
    """Without a backslash, what stands behind ``in_features: C.`` would be the third item of a list A., B., C."""
    lines[:] = [re.sub(r"(: )(?=[A-Za-z]\.( |$))", r"\1\\", line) for line in lines]


def skip(app: Sphinx, what: str, name: str, obj: object, skipped: bool, options: dict) -> bool | None:
    """The fields of a NamedTuple are in its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """What the README links beside docs/ (licence, scripts, ...) can be downloaded; 68.2 ± 7.5 stays on one line."""
    text = re.sub(r"(?<!!)(\[[^]]*\])\((?!\w+:|#|docs/)([^)]+)\)", r"\1(path:../\2)", content[0])
    content[0] = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def aggregator_sections(app: Sphinx, page: str, content: list[str]) -> None:
    """A section for each file of temporal_agg/aggregators, in the place of {{aggregators}}."""
    if "{{aggregators}}" not in content[0]:
        return
    sections = []
    for found in pkgutil.iter_modules(temporal_agg.aggregators.__path__):
        module = importlib.import_module(f"temporal_agg.aggregators.{found.name}")
        entries = map(temporal_agg.aggregators.registry_entry, temporal_agg.list_aggregators())
        names = [entry.name for entry in entries if entry.build.__module__ == module.__name__]
        if not names:
            continue
        paper = getattr(module, "PAPER", None)
        title = paper.name if paper else found.name.capitalize()
        objects = "".join(
            f".. auto{'class' if isinstance(getattr(module, name), type) else 'function'}:: "
            f"{'temporal_agg' if name in temporal_agg.__all__ else module.__name__}.{name}\n"
            for name in getattr(module, "__all__", [])
        )
        sections.append(
            f"## {title}\n\n{', '.join(f'`{name}`' for name in names)}\n\n```{{eval-rst}}\n"
            f".. automodule:: {module.__name__}\n   :no-members:\n\n{objects}```\n"
        )
    content[0] = content[0].replace("{{aggregators}}", "\n".join(sections))


def setup(app: Sphinx) -> None:
    app.connect("source-read", aggregator_sections)
    app.connect("missing-reference", resolve)
    app.connect("include-read", included)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
