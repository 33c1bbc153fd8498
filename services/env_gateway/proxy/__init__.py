"""The proxy through which a session without a network reaches the hosts that `env_gateway.child_hosts` names.

    session, in its network namespace                    gateway
    client --> 127.0.0.1:PORT, a socket that the     --> accepts, checks the host of each connection,
               session opened and gave the gateway       resolves its name, connects, copies bytes

No process or route leads out of the namespace: the gateway serves a listening socket that belongs to it.
"""
