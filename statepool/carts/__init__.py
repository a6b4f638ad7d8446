"""
Carts: files and states for people without a pool.

A cart is a list of files and states. The service stages them from pools and archives, checks them,
and serves them as one tar over HTTP. It implements the interface of Pacifica's Cartd and uses only
public names of statepool. No lower package imports it; ``pip install statepool[serve]`` installs
the dependencies of all but ``client``, with which a user asks such a service.
"""
