"""Sandboxes of the published SDK: made, used and deleted."""

import time
import unittest

from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

import node

# The smallest tier.
SIZE = {"cpu": "250m", "memory": "512Mi"}


class Sandboxes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.group = node.client()
        made = cls.group.begin_create_sandbox(
            disk="debian", labels={"made-by": "sdk"}, environment={"GREETING": "hello"}, **SIZE
        )
        cls.sandbox = made.result()

    @classmethod
    def tearDownClass(cls):
        cls.group.begin_delete_sandbox(cls.sandbox.sandbox_id).result()
        try:
            cls.group.get_sandbox(cls.sandbox.sandbox_id)
            raise AssertionError("the sandbox is still there")
        except ResourceNotFoundError:
            cls.group.close()

    def test_it_says_what_it_is(self):
        sandbox = self.sandbox.get()
        self.assertEqual(sandbox.state, "Running")
        self.assertEqual(sandbox.labels, {"made-by": "sdk"})
        self.assertEqual((sandbox.resources.cpu, sandbox.resources.memory), ("250m", "512Mi"))
        self.assertEqual(sandbox.sources_ref.disk_image.name, "debian")
        self.assertEqual(sandbox.lifecycle.auto_suspend.interval, 300)
        found = self.group.list_sandboxes(labels={"made-by": "sdk"})
        self.assertIn(sandbox.id, [one.id for one in found])

    def test_a_command_runs_with_its_streams_apart(self):
        result = self.sandbox.exec("echo $GREETING; echo trouble >&2; exit 7")
        self.assertEqual(result.exit_code, 7)
        self.assertEqual((result.stdout, result.stderr), ("hello\n", "trouble\n"))

    def test_a_command_runs_in_the_folder_it_is_given(self):
        self.assertEqual(self.sandbox.exec("pwd", working_directory="/tmp").stdout, "/tmp\n")

    def test_python_runs(self):
        self.assertEqual(self.sandbox.exec("python3 -c 'print(6 * 7)'").stdout, "42\n")

    def test_it_is_stopped_and_goes_on_by_a_resume_or_by_a_command(self):
        self.sandbox.exec("echo kept > /tmp/kept")
        self.sandbox.begin_stop().result()
        stopped = self.sandbox.get()
        self.assertEqual(stopped.state, "Suspended")
        self.assertEqual(stopped.state_details.stopped_reason, "UserStopped")
        self.sandbox.begin_resume().result()
        self.assertEqual(self.sandbox.exec("cat /tmp/kept").stdout, "kept\n")
        with self.assertRaises(HttpResponseError):
            self.sandbox.resume()
        self.sandbox.stop()
        self.assertEqual(self.sandbox.exec("cat /tmp/kept").stdout, "kept\n")
        self.sandbox.stop()
        self.sandbox.ensure_running()

    def test_a_snapshot_is_made_and_a_sandbox_of_it(self):
        self.sandbox.exec("echo saved > /dev/shm/saved")
        snapshot = self.sandbox.create_snapshot(name="first")
        self.assertEqual((snapshot.labels, snapshot.sandbox_id), ({"name": "first"}, self.sandbox.sandbox_id))
        self.assertIn(snapshot.id, [one.id for one in self.group.list_snapshots()])
        self.assertEqual(self.group.get_snapshot(snapshot.id).resources.cpu, "250m")
        clone = self.group.begin_create_sandbox(disk=None, snapshot_id=snapshot.id).result()
        try:
            self.assertEqual(clone.exec("cat /dev/shm/saved; hostname").stdout, f"saved\n{clone.sandbox_id}\n")
            self.assertEqual(clone.get().sources_ref.snapshot.id, snapshot.id)
        finally:
            self.group.begin_delete_sandbox(clone.sandbox_id).result()
        again = self.sandbox.begin_create_snapshot(name="second").result()
        for one in (snapshot, again):
            self.group.delete_snapshot(one.id)
            with self.assertRaises(ResourceNotFoundError):
                self.group.get_snapshot(one.id)

    def test_its_lifecycle_policy_is_changed(self):
        policy = self.sandbox.get().lifecycle
        policy.auto_suspend.interval = 777
        self.sandbox.set_lifecycle_policy(policy)
        self.assertEqual(self.sandbox.get().lifecycle.auto_suspend.interval, 777)

    def test_a_program_that_is_not_there_is_the_shells_error(self):
        result = self.sandbox.exec("no-such-program")
        self.assertEqual(result.exit_code, 127)
        self.assertIn("no-such-program", result.stderr)

    def test_a_folder_that_is_not_there_is_an_error_that_names_it(self):
        with self.assertRaises(HttpResponseError) as caught:
            self.sandbox.exec("true", working_directory="/no/such/folder")
        self.assertIn("/no/such/folder", caught.exception.error.message)

    def test_a_file_is_read_back_as_it_was_written(self):
        content = bytes(range(256)) * 8192
        self.sandbox.write_file("/tmp/new folder/ä+b.bin", content, mode="0640")
        self.assertEqual(self.sandbox.read_file("/tmp/new folder/ä+b.bin"), content)
        shown = self.sandbox.exec("stat -c %a '/tmp/new folder/ä+b.bin'")
        self.assertEqual(shown.stdout, "640\n")

    def test_a_file_that_is_not_there_is_not_found(self):
        with self.assertRaises(ResourceNotFoundError) as caught:
            self.sandbox.read_file("/no/such/file")
        self.assertEqual(caught.exception.error.code, "FileNotFound")

    def test_output_without_end_is_cut_and_said_to_be(self):
        result = self.sandbox.exec("head -c 60000000 /dev/zero | tr '\\0' x")
        self.assertEqual(result.exit_code, 0)
        self.assertEqual(len(result.stdout), 8 * 1024 * 1024)
        self.assertIn("stdout was cut", result.stderr)

    def test_a_command_that_takes_its_time_keeps_the_client_alive(self):
        began = time.monotonic()
        self.assertEqual(self.sandbox.exec("sleep 25; echo done").stdout, "done\n")
        self.assertGreater(time.monotonic() - began, 24)
