"""Which addresses this installation may call on somebody's word: public ones, and those it is told."""

import dataclasses
import ipaddress
from typing import Final

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


@dataclasses.dataclass(frozen=True, slots=True)
class Networks:
    """Networks allowed beside the public ones, as `10.0.0.0/8, ::1/128`. Raises ValueError."""

    text: str = ""

    def __post_init__(self) -> None:
        self._allowed()

    def __str__(self) -> str:
        return self.text

    def allow(self, address: str) -> bool:
        """Whether this address, as it stands in a socket's name, may be connected to."""
        found = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if any(found in network for network in self._allowed()):
            return True
        return all(each.is_global and not each.is_multicast for each in (found, *_within(found)))

    def _allowed(self) -> tuple[_Network, ...]:
        parts = (part.strip() for part in self.text.split(","))
        return tuple(ipaddress.ip_network(part) for part in parts if part)


def _plain(address: _Address) -> _Address:
    """An IPv4 address that is written as an IPv6 one is still that one."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _within(address: _Address) -> tuple[_Address, ...]:
    """The IPv4 address that a translator on the way would make of an IPv6 one."""
    if not isinstance(address, ipaddress.IPv6Address):
        return ()
    if address in _NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    return () if address.sixtofour is None else (address.sixtofour,)
