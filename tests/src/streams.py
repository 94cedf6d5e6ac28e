"""Kubernetes' client for Python at a URL of the streaming server, over WebSocket.

usage: streams.py exec URL | end URL [CERTIFICATE] | terminal URL | forward URL PORT
"""
import sys
import types

# The packages' own modules import every type of the API, which takes minutes in the bed.
for name in ("kubernetes", "kubernetes.client"):
    package = types.ModuleType(name)
    package.__path__ = ["/usr/lib/python3/dist-packages/" + name.replace(".", "/")]
    sys.modules[name] = package

from kubernetes.stream import ws_client  # noqa: E402


class Configuration:
    verify_ssl = False
    ssl_ca_cert = cert_file = key_file = assert_hostname = None
    proxy = proxy_headers = None


def connect(url, version="v4"):
    headers = {"sec-websocket-protocol": version + ".channel.k8s.io"}
    return ws_client.WSClient(Configuration, url.replace("http", "ws", 1), headers, True)


def until(client, channel, word):
    text = ""
    while word not in text and client.is_open():
        client.update(timeout=None)
        text += client.read_channel(channel)
    return text


def command(url):
    client = connect(url)
    client.write_stdin("from python\n")
    client.run_forever()
    print(client.read_channel(1), end="")
    print(client.read_channel(2), end="")
    print(client.returncode)


def end(url, certificate=None):
    """Sends a line, then ends the input, which the package leaves to its user."""
    Configuration.verify_ssl = certificate is not None
    Configuration.ssl_ca_cert = certificate
    client = connect(url, "v5")
    client.write_stdin("from python\n")
    client.sock.send_binary(b"\xff\x00")
    client.run_forever()
    print(client.read_channel(1), end="")
    print(client.returncode)


def terminal(url):
    client = connect(url)
    client.write_channel(4, '{"Width":132,"Height":50}')
    print(until(client, 1, "50 132").strip())
    client.write_channel(4, '{"Width":40,"Height":10}')
    print(until(client, 1, "10 40").strip())
    client.write_stdin("exit 4\n")
    client.run_forever()
    print(client.returncode)


def forward(url, port):
    headers = {"sec-websocket-protocol": "v4.channel.k8s.io"}
    socket = ws_client.create_websocket(Configuration, url.replace("http", "ws", 1), headers)
    ports = ws_client.PortForward(socket, [int(port)])
    stream = ports.socket(int(port))
    stream.sendall(b"from python\n")
    print(stream.makefile().readline(), end="")
    ports.close()


CASES = {"exec": command, "end": end, "terminal": terminal, "forward": forward}
CASES[sys.argv[1]](*sys.argv[2:])
