<?php
// FCGI_STDERR before, between and after the answer: ?bytes= in each of ?lines= messages.
require __DIR__ . '/_shared.php';

$lines = (int) ($_GET['lines'] ?? 1);
$text = str_pad($_GET['text'] ?? 'murmur', (int) ($_GET['bytes'] ?? 0), '.');
for ($i = 0; $i < $lines; $i++) {
    error_log("$text $i before");
}
header('Content-Type: text/plain');
echo "first\n";
flush();
for ($i = 0; $i < $lines; $i++) {
    error_log("$text $i between");
}
echo "second\n";
flush();
error_log("$text after");
