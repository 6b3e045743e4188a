"""``python -m fastmixer evidence``: proves and measures the library on the GPU at hand, within minutes.

``plan`` says what is done and in which order, ``runner`` gives each stage a process and a limit, ``summary``
makes of what lies on disk what a person reads. ``stages`` is what runs of no other command.
"""
