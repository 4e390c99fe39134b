"""The directives `flags COMMAND`, its flags by heading, and `commands`, all commands: from flags.py and cli.py."""

import inspect

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.util.docutils import SphinxDirective

from mambahome_jax import cli, usage


def _table(rows: list[tuple[nodes.Node, str]], heads: tuple[str, str]) -> nodes.table:
    def row(*cells: nodes.Node) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))

    head = nodes.thead("", row(*map(nodes.Text, heads)))
    body = nodes.tbody("", *(row(name, nodes.Text(text)) for name, text in rows))
    widths = [nodes.colspec(colwidth=35), nodes.colspec(colwidth=65)]
    return nodes.table("", nodes.tgroup("", *widths, head, body, cols=2), classes=["flags"])


class FlagsDirective(SphinxDirective):
    """Say what the command that is its argument does, and its flags in tables under their headings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        config = cli.flags_of(self.arguments[0])
        self.env.note_dependency(inspect.getfile(config))
        about = " ".join((inspect.getdoc(config) or "").split())
        described: list[nodes.Node] = [nodes.paragraph("", "", nodes.Text(about))]
        for heading, flags in usage.groups(config).items():
            table = _table([(nodes.literal("", str(flag)), flag.help()) for flag in flags], ("flag", "what it does"))
            section = nodes.section("", nodes.title("", heading), table, ids=[nodes.make_id(heading)])
            described.append(section)
        return described


class CommandsDirective(SphinxDirective):
    """List all commands with links to their pages."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(cli.__file__)
        rows: list[tuple[nodes.Node, str]] = []
        for name, text in cli.COMMANDS.items():
            link = pending_xref("", refdomain="std", reftype="doc", reftarget=name, refexplicit=True, refwarn=True)
            link["refdoc"] = self.env.docname
            link += nodes.inline("", name)
            rows.append((link, text))
        return [_table(rows, ("command", "what it does"))]


def setup(app):
    """Register the directives."""
    app.add_directive("flags", FlagsDirective)
    app.add_directive("commands", CommandsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
