"""The stages: the only rooms that know both Ray and the method.

A stage is a function of its section of the configuration, its inputs' folders and an output folder.
It writes whole files into the output folder, `summary.json` among them, and keeps what an
interrupted build goes on from in its work folder. It does not know where it is stored or why.
"""
