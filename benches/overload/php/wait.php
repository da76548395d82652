<?php
// Waits on a socket for ?ms=, as for a database: holds its worker without CPU.
require __DIR__ . '/_journal.php';

[$ours, $theirs] = stream_socket_pair(STREAM_PF_UNIX, STREAM_SOCK_STREAM, STREAM_IPPROTO_IP);
$end = hrtime(true) + (int) (times((int) $_GET['ms']) * 1e6);
while (($left = intdiv($end - hrtime(true), 1000)) > 0) {
    $read = [$ours];
    $none = null;
    stream_select($read, $none, $none, 0, $left);
}
echo "waited\n";
