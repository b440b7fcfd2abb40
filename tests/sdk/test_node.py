"""What the published SDK gets from a node without a microVM running."""

import asyncio
import time
import unittest

from azure.containerapps.sandbox.aio import SandboxGroupClient as AsyncSandboxGroupClient
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
)

import node


class Lists(unittest.TestCase):
    def test_sandboxes_and_disk_images_are_iterated(self):
        with node.client() as client:
            list(client.list_sandboxes())
            list(client.list_sandboxes(labels={"app": "none", "tier": "x"}))
            list(client.list_disk_images())

    def test_public_images_are_listed_and_found_by_name(self):
        with node.client() as client:
            for image in client.list_public_disk_images():
                self.assertEqual(image.status.state, "Ready")
                self.assertEqual(client.get_public_disk_image(image.name).id, image.id)
            with self.assertRaises(ResourceNotFoundError):
                client.get_public_disk_image("no-such-image")


class Images(unittest.TestCase):
    def test_an_image_that_cannot_be_had_fails_and_can_be_deleted(self):
        with node.client() as client:
            poller = client.begin_create_disk_image("127.0.0.1:1/none/such:1", name="none")
            with self.assertRaises(RuntimeError):
                poller.result()
            failed = [image for image in client.list_disk_images() if image.name == "none"]
            self.assertEqual([image.status.state for image in failed], ["Failed"])
            client.delete_disk_image(failed[0].id)
            with self.assertRaises(ResourceNotFoundError):
                client.get_disk_image(failed[0].id)


class Groups(unittest.TestCase):
    def test_a_group_is_made_found_listed_and_deleted(self):
        with node.groups() as groups:
            name = f"sdk-{time.time_ns()}"
            made = groups.begin_create_group(name, location="local", tags={"a": "b"}).result()
            self.assertEqual(made.name, name)
            self.assertEqual(groups.get_group(name).tags, {"a": "b"})
            self.assertIn(name, [group.name for group in groups.list_groups()])
            with node.client(name) as client:
                self.assertEqual(list(client.list_sandboxes()), [])
            groups.begin_delete_group(name).result()
            with self.assertRaises(ResourceNotFoundError):
                groups.get_group(name)


class Errors(unittest.TestCase):
    """Each at its first try: an error that the SDK replays would take minutes."""

    def setUp(self):
        self.began = time.monotonic()

    def tearDown(self):
        self.assertLess(time.monotonic() - self.began, 5, "the SDK replayed the call")

    def test_a_wrong_token_is_an_authentication_error(self):
        with node.client(token="hf_wrong") as client:
            with self.assertRaises(ClientAuthenticationError) as caught:
                list(client.list_sandboxes())
        self.assertEqual(caught.exception.error.code, "Unauthorized")

    def test_what_is_not_there_is_not_found(self):
        with node.client() as client, node.client("no-such-group") as elsewhere:
            calls = {
                "SandboxNotFound": lambda: client.get_sandbox("a" * 20),
                "DiskImageNotFound": lambda: client.get_disk_image("a" * 20),
                "SandboxGroupNotFound": lambda: list(elsewhere.list_sandboxes()),
                "SnapshotNotFound": lambda: client.get_snapshot("a" * 20),
                "UnsupportedOperation": lambda: list(client.list_volumes()),
            }
            for code, call in calls.items():
                with self.subTest(code), self.assertRaises(ResourceNotFoundError) as caught:
                    call()
                self.assertEqual(caught.exception.error.code, code)

    def test_a_snapshot_that_is_not_there_is_named(self):
        with node.client() as client, self.assertRaises(ResourceNotFoundError) as caught:
            client.begin_create_sandbox(disk=None, snapshot_id="a" * 20)
        self.assertIn("a" * 20, caught.exception.error.message)

    def test_a_public_image_that_is_not_there_is_named(self):
        with node.client() as client, self.assertRaises(ResourceNotFoundError) as caught:
            client.begin_create_sandbox(disk="no-such-image")
        self.assertIn("no-such-image", caught.exception.error.message)

    def test_an_option_that_is_not_carried_out_is_refused_by_name(self):
        options = {
            "customerVnetConnectionName": {"customer_vnet_connection_name": "v"},
            "vmmType": {"vmm_type": "x"},
            "connections": {"connections": ["c"]},
            "presetSandboxType": {"disk": None, "preset": "code"},
            "ports": {"ports": [80]},
        }
        with node.client() as client:
            for field, option in options.items():
                with self.subTest(field), self.assertRaises(HttpResponseError) as caught:
                    client.begin_create_sandbox(**({"disk": "debian"} | option))
                self.assertEqual(caught.exception.status_code, 400)
                self.assertEqual(caught.exception.error.code, "UnsupportedField")
                self.assertTrue(caught.exception.error.message.startswith(field))

    def test_a_size_outside_the_tiers_has_the_services_code(self):
        with node.client() as client, self.assertRaises(HttpResponseError) as caught:
            client.begin_create_sandbox(disk="debian", cpu="250m", memory="8192Mi")
        self.assertEqual(caught.exception.error.code, "InvalidResourceTier")


class Async(unittest.TestCase):
    def test_the_async_client_gets_the_same_answers(self):
        async def calls():
            client = AsyncSandboxGroupClient(
                node.ENDPOINT,
                node.AsyncNodeToken(),
                subscription_id=node.SUBSCRIPTION,
                resource_group=node.RESOURCE_GROUP,
                sandbox_group="default",
            )
            async with client:
                async for _ in client.list_sandboxes():
                    pass
                with self.assertRaises(ResourceNotFoundError):
                    await client.get_sandbox("a" * 20)

        asyncio.run(calls())
