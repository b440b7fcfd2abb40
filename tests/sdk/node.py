"""The node under test, as a user of the published SDK would set it up."""

import os
import time

from azure.containerapps.sandbox import SandboxGroupClient, SandboxGroupManagementClient
from azure.core.credentials import AccessToken
from azure.core.pipeline.transport import RequestsTransport

ENDPOINT = os.environ["HOLDFAST_ENDPOINT"]
SUBSCRIPTION, RESOURCE_GROUP = "local", "default"


class NodeToken:
    """The node's admin token, as a credential."""

    def __init__(self, token=None):
        self.token = token or os.environ["HOLDFAST_TOKEN"]

    def get_token(self, *_scopes, **_options):
        return AccessToken(self.token, int(time.time()) + 86400)


class AsyncNodeToken(NodeToken):
    async def get_token(self, *_scopes, **_options):
        return AccessToken(self.token, int(time.time()) + 86400)

    async def close(self):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        pass


class ToNode(RequestsTransport):
    """Sends what is meant for Azure's resource manager to the node."""

    def send(self, request, **options):
        request.url = request.url.replace("https://management.azure.com", ENDPOINT, 1)
        return super().send(request, **options)


def client(group="default", token=None, **options):
    return SandboxGroupClient(
        ENDPOINT,
        NodeToken(token),
        subscription_id=SUBSCRIPTION,
        resource_group=RESOURCE_GROUP,
        sandbox_group=group,
        **options,
    )


def groups():
    return SandboxGroupManagementClient(
        NodeToken(),
        subscription_id=SUBSCRIPTION,
        resource_group=RESOURCE_GROUP,
        transport=ToNode(),
    )
