"""Environments in processes of their own, forked from a process that has their modules loaded.

    gateway  --- control: "start this", with two sockets --->  nursery (nursery.py)
        |  \\                                                      | forks
        |   +-- leash: its end says "kill"; the exit code back --+  v
        +------ channel: one line of JSON a call, one back ------ child (child.py)

Closing is the only command: a leash that ends, for whatever reason, kills its child, and the nursery ends with its
control socket. So nothing outlives the gateway, even if that is killed and a child hangs in C code.
"""
