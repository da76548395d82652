<?php
// ?mib=16 or ?bytes=: the bytes of tests/support/pattern.rs, blocks of 4096 that begin with their number.
// ?length=0 leaves Content-Length out.
require __DIR__ . '/_shared.php';

$bytes = isset($_GET['bytes']) ? (int) $_GET['bytes'] : (int) ($_GET['mib'] ?? 16) * 1048576;
header('Content-Type: application/octet-stream');
if (($_GET['length'] ?? '1') !== '0') {
    header('Content-Length: ' . $bytes);
}
$filler = substr(str_repeat('abcdefghijklmnopqrstuvwxyz', 157), 0, 4080);
for ($block = 0, $left = $bytes; $left > 0; $block++, $left -= 4096) {
    $piece = sprintf("%015x\n", $block) . $filler;
    echo $left >= 4096 ? $piece : substr($piece, 0, $left);
}
