"""What a run would do and cost, before any of it is done.

plan             the command: reads the recipe and config.json, prints tables
hours            tokens and stages that end in time, where the recipe says hours
cost             sizes, tokens and FLOPs of each stage, by arithmetic
memory           device memory of scoring, refit and training, by compiling
training_memory  the part of it that is training, compiled or added up
arrays           abstract arrays: sizes, and where they lie on a mesh
disk             bytes of original, export, checkpoints, teacher's cache
compiling        by the TPU compiler, as far as memory is known
elsewhere        in a process with other devices than there are here
times            hours of a run, by what they go to
advice           what will not work, and what to change
hardware         the devices that are meant, and what is known of them
"""
