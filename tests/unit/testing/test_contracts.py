"""What is not meant for somebody is not there for him."""

from __future__ import annotations

from statepool.testing.contracts import Contract, only_if


class Base(Contract):
    swims = False

    def test_walks(self) -> None:
        """For all."""

    @only_if("swims")
    def test_swims(self) -> None:
        """For some."""


class Animal(Base):
    pass


class Fish(Animal):
    swims = True


class Cat(Animal):
    pass


def test_each_has_its_tests() -> None:
    assert callable(Fish().test_swims)
    assert callable(Fish().test_walks)
    assert callable(Cat().test_walks)
    assert Cat().test_swims is None
