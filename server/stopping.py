"""uvicorn's server, which lets those go at once who wait for answers; it knows when it is to stop."""

import socket

import uvicorn

from server.deps import Services


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Else requests that wait for minutes would be what is waited for."""
        services: Services = self.lifespan.state["services"]
        services.waiting_room.dismiss()
        await super().shutdown(sockets)
