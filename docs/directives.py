"""Directives of the docs: what they show is taken from the code when the site is built."""

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from docs import facts


class SettingDirective(SphinxDirective):
    """``.. setting:: NAME``: one setting, with what the page adds to it."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return what the code says of the setting, then the text of the page.

        Raises a directive error for a name that is no setting.
        """
        setting = facts.settings().get(self.arguments[0])
        if setting is None:
            raise self.error(f"{self.arguments[0]} is no setting")
        lines = [f".. confval:: {setting.name}", f"   :type: {setting.kind}"]
        if setting.default is not None:
            lines.append(f"   :default: ``{setting.default}``")
        help = setting.help[:1].upper() + setting.help[1:]
        help = help.replace("*", r"\*").replace("--", r"\--")
        place = "In the settings file only." if setting.file_only else ""
        lines += ["", f"   {help.rstrip('.')}.", ""]
        lines += [f"   {line}" for line in (place, "", *self.content)]
        return self.parse_text_to_nodes("\n".join(lines))


class HelpDirective(SphinxDirective):
    """``.. help:: COMMAND``: what the command prints for ``--help``."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block. Raises for a command that is unknown."""
        text = facts.help_texts().get(self.arguments[0])
        if text is None:
            raise self.error(f"there is no command {self.arguments[0]}")
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives with Sphinx."""
    app.add_directive("setting", SettingDirective)
    app.add_directive("help", HelpDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
