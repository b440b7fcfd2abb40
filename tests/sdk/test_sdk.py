"""The published SDK, unmodified, against a node: what its users do first."""

import os
import time
import unittest

from azure.containerapps.sandbox import SandboxGroupClient, SandboxGroupManagementClient
from azure.containerapps.sandbox import _sandboxgroup_mgmt_client as management
from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError

ENDPOINT = os.environ["HOLDFAST_ENDPOINT"]
SMALL = {"cpu": "250m", "memory": "512Mi"}


class NodeToken:
    def __init__(self, token=os.environ["HOLDFAST_TOKEN"]):
        self.token = token

    def get_token(self, *scopes, **kw):
        return AccessToken(self.token, int(time.time()) + 86400)


def client(group="default", token=None):
    credential = NodeToken(token) if token else NodeToken()
    return SandboxGroupClient(
        ENDPOINT, credential, subscription_id="local", resource_group="default", sandbox_group=group
    )


class Sandboxes(unittest.TestCase):
    def test_a_sandbox_is_created_used_and_deleted(self):
        with client() as group:
            sandbox = group.begin_create_sandbox(
                disk="debian", labels={"for": "sdk"}, environment={"GREETING": "hello"}, **SMALL
            ).result()
            listed = list(group.list_sandboxes(labels={"for": "sdk"}))
            self.assertEqual([one.id for one in listed], [sandbox.sandbox_id])
            self.assertEqual(str(sandbox.get().state).split(".")[-1].lower(), "running")

            done = sandbox.exec("echo $GREETING; pwd; echo trouble >&2; exit 7", working_directory="/tmp")
            self.assertEqual((done.exit_code, done.stdout, done.stderr), (7, "hello\n/tmp\n", "trouble\n"))
            python = sandbox.exec("python3 -c 'print(6 * 7)'")
            self.assertEqual((python.exit_code, python.stdout), (0, "42\n"))

            sandbox.write_file("/srv/new/ä b.txt", b"\x00bytes\xff")
            self.assertEqual(bytes(sandbox.read_file("/srv/new/ä b.txt")), b"\x00bytes\xff")
            with self.assertRaises(ResourceNotFoundError):
                sandbox.read_file("/srv/none")

            group.begin_delete_sandbox(sandbox.sandbox_id).result()
            self.assertEqual(list(group.list_sandboxes(labels={"for": "sdk"})), [])
            with self.assertRaises(ResourceNotFoundError):
                group.delete_sandbox(sandbox.sandbox_id)

    def test_what_is_not_carried_out_yet_is_refused_by_its_name(self):
        with client() as group, self.assertRaises(HttpResponseError) as caught:
            group.begin_create_sandbox(disk="debian", ports=[80], **SMALL)
        self.assertEqual(caught.exception.status_code, 400)
        self.assertIn("ports", caught.exception.message)

    def test_a_wrong_token_is_an_authentication_error(self):
        with client(token="hf_wrong") as group, self.assertRaises(ClientAuthenticationError):
            list(group.list_sandboxes())


class Images(unittest.TestCase):
    def test_the_public_image_is_there_without_a_registry(self):
        with client() as group:
            self.assertIn("debian", [image.name for image in group.list_public_disk_images()])
            self.assertEqual(group.get_public_disk_image("debian").name, "debian")
            with self.assertRaises(ResourceNotFoundError):
                group.get_public_disk_image("none")

    def test_an_image_that_cannot_be_had_fails_with_the_reason(self):
        with client() as group:
            poller = group.begin_create_disk_image("127.0.0.1:1/none/such:1", name="none")
            with self.assertRaises(RuntimeError):
                poller.result()
            for image in group.list_disk_images():
                group.delete_disk_image(image.id)
            self.assertEqual(list(group.list_disk_images()), [])


class Groups(unittest.TestCase):
    def test_a_group_is_made_listed_and_deleted(self):
        management.ARM_BASE = ENDPOINT
        with SandboxGroupManagementClient(
            NodeToken(), subscription_id="local", resource_group="default"
        ) as groups:
            made = groups.begin_create_group("from-sdk", "local").result()
            self.assertEqual(made.name, "from-sdk")
            names = [group.name for group in groups.list_groups()]
            self.assertIn("default", names)
            self.assertIn("from-sdk", names)
            with client(group="from-sdk") as group:
                self.assertEqual(list(group.list_sandboxes()), [])
            groups.begin_delete_group("from-sdk").result()
            with self.assertRaises(ResourceNotFoundError):
                groups.get_group("from-sdk")
        with client(group="from-sdk") as group, self.assertRaises(ResourceNotFoundError):
            list(group.list_sandboxes())


if __name__ == "__main__":
    unittest.main()
