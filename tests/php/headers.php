<?php
// Answers that try the header code: ?status=404|204|304|..., ?location=, ?cookies=, ?large=bytes, ?count=headers.
require __DIR__ . '/_shared.php';

for ($i = 0; $i < (int) ($_GET['cookies'] ?? 3); $i++) {
    setcookie("crumb$i", "value $i", ['path' => '/', 'httponly' => true]);
}
for ($i = 0; $i < (int) ($_GET['count'] ?? 0); $i++) {
    header("X-Many-$i: $i");
}
if (isset($_GET['large'])) {
    header('X-Large: ' . str_repeat('x', (int) $_GET['large']));
}
if (isset($_GET['location'])) {
    header('Location: ' . $_GET['location']);
}
$status = (int) ($_GET['status'] ?? (isset($_GET['location']) ? 302 : 200));
http_response_code($status);
if ($status === 304) {
    header('ETag: "slack"');
}
if ($status !== 204 && $status !== 304) {
    header('Content-Type: text/plain');
    echo 'status ', $status, "\n";
}
