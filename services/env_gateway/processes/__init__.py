"""Environments in child processes, forked from a server process that has loaded their modules.

    gateway  --- control: "start this", with two sockets --->  fork server (fork_server.py)
        |  \\                                                      | forks
        |   +-- leash: its end says "kill"; the exit code back --+  v
        +------ channel: one line of JSON a call, one back ------ child (child.py)

Closing a socket is the only command: the end of a leash, for any reason, kills its child, and the fork server exits
when its control socket ends. No process therefore outlives the gateway, even if the gateway is killed and a child hangs
in C code.
"""
