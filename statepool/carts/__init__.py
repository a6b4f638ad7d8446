"""
Carts: files and states for people without a pool.

A cart is a list of files and states. The service stages them from pools and archives, checks them,
and hands them out as one tar over HTTP. It speaks the interface of Pacifica's Cartd and uses
public names of statepool only. Nothing below imports it; ``pip install statepool[serve]`` installs
what it needs, beside ``client``, which is for those who ask such a service.
"""
