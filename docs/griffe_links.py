"""Griffe extension: [`Name`] in a docstring, as transformers and diffusers write it, becomes a link to the object."""

import re

import griffe


REFERENCE = re.compile(r"\[`([\w.]+)`\](?![\[(])")


class DocstringLinks(griffe.Extension):
    """Resolves each name in the scope of its docstring; a name without an entry in the API pages stays plain code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self._link(pkg)

    def _link(self, item: griffe.Object) -> None:
        if item.docstring:
            item.docstring.value = REFERENCE.sub(lambda match: self._reference(item, match[1]), item.docstring.value)
        for member in item.members.values():
            if not member.is_alias:
                self._link(member)

    @staticmethod
    def _reference(item: griffe.Object, name: str) -> str:
        first, *rest = name.split(".")
        try:
            path = ".".join([item.resolve(first), *rest])
        except griffe.NameResolutionError:
            path = name
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
