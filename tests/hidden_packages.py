"""Code that hides packages from a Python of its own, as if they had never been installed."""

HIDE = """
import sys

class Hidden:
    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

def hide(*names):
    sys.meta_path.insert(0, Hidden(*names))
    sys.modules.update(dict.fromkeys(names))
"""
