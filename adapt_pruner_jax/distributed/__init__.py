"""Devices and processes: where arrays live, who writes, who is gone.

sharding         the mesh, and how each parameter is cut over it
mesh_flags       the mesh of commands without a recipe
embedding        the embedding, looked up where it lies
placement        rows, replicas and minibatches on the mesh
to_writer        an array of all processes, brought to process 0
each_device      what each device does alone with its rows
virtual_devices  threads enough for several CPU devices
agreement        one process decides or writes, all come to the same end
joining          the flags of one process among several
processes        joins the others, waits for them, ends when one is gone
stopping         asked to stop, by a signal to any process
"""
