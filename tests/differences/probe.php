<?php
// Answers what it was told, as JSON; every byte that is not plain ASCII as \xHH. The query may ask for more:
// accel=PATH, status=CODE, location=URL, type=TYPE, header=LINE, silent=1, fill=BYTES (of x, in place of the JSON).
parse_str($_SERVER['QUERY_STRING'] ?? '', $asked);
$apart = ['SERVER_PORT', 'REMOTE_PORT', 'SERVER_SOFTWARE', 'REQUEST_TIME', 'REQUEST_TIME_FLOAT', 'argv', 'argc', 'USER', 'HOME', 'FCGI_ROLE'];
$shown = fn ($text) => preg_replace_callback('/[^ -\[\]-~]/', fn ($m) => sprintf('\x%02x', ord($m[0])), (string) $text);
$told = [];
foreach ($_SERVER as $name => $value) {
    // An identifier that the server has made up is another one each time, and the test asks for `Connection: close` wherever it asks for nothing else.
    $is_noise = $name === 'HTTP_X_REQUEST_ID' && strlen($value) >= 20 || $name === 'HTTP_CONNECTION' && $value === 'close';
    if (!in_array($name, $apart, true) && !$is_noise) {
        $told[$shown($name)] = $shown($value);
    }
}
$body = file_get_contents('php://input');
$told['BODY'] = strlen($body) . ' ' . md5($body);
ksort($told);
$json = json_encode($told, JSON_UNESCAPED_SLASHES);
if (isset($asked['status'])) {
    http_response_code((int) $asked['status']);
}
if (isset($asked['accel'])) {
    header('X-Accel-Redirect: ' . $asked['accel']);
}
if (isset($asked['location'])) {
    header('Location: ' . $asked['location'], true, (int) ($asked['status'] ?? 302));
}
foreach ((array) ($asked['header'] ?? []) as $line) {
    header($line, false);
}
header('Content-Type: ' . ($asked['type'] ?? 'application/json; charset=utf-8'));
if (isset($asked['fill'])) {
    // In pieces with time between them, so that nobody has the whole at once.
    for ($left = (int) $asked['fill']; $left > 0; $left -= 65536) {
        echo str_repeat('x', min($left, 65536));
        flush();
        usleep(2000);
    }
    exit;
}
header('X-Probe: ' . ($_SERVER['REQUEST_METHOD'] === 'HEAD' ? rawurlencode($json) : 'body'));
if (empty($asked['silent'])) {
    echo $json;
}
