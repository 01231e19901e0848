"""What a run would do and cost, before any of it.

plan      sizes, FLOPs, hours and bytes of each stage
memory    device memory of scoring, refit and training
hardware  the devices that a run is planned for
"""
